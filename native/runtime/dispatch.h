// Which instruction sets this CPU and kernel offer, and the one in use.
#pragma once
#include <string>
#include <vector>

#include "isa/kernels.h"

namespace coterie {

// Best first: those that are chosen without being asked for, or those whose instructions are emulated, for tests.
std::vector<const Kernels*> available_kernels(bool automatic = true);

// The kernels in use, and why. Throws std::runtime_error when COTERIE_ISA names one that is unknown or that the CPU lacks.
const Kernels& kernels();
const std::string& kernels_reason();
void use_kernels(const std::string& name);

}  // namespace coterie
