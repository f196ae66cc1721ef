"""Every instruction set this CPU has, and those that are emulated: AMX's tiles always, more under `make emulate`."""

import coterie
from coterie import _native

ISAS = [*coterie.cpu.info().isas, *_native.emulated_isas()]

# Keeps activations in float32, where others round them to bf16: sums in another order move a value across a rounding
# boundary, and a model carries that on.
FLOAT32 = "avx2" if "avx2" in ISAS else "scalar"
