#!/bin/sh
# The engine without its Python binding, cross-compiled for aarch64 and run under emulation.
# Debian: apt install g++-aarch64-linux-gnu qemu-user
set -e
cd "$(dirname "$0")/../.."
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
aarch64-linux-gnu-g++ -std=gnu++20 -O2 -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -static -Inative -o "$built/check" \
  tests/aarch64/check.cpp native/isa/scalar.cpp native/formats/*.cpp native/layer/*.cpp native/runtime/*.cpp
qemu-aarch64 "$built/check"
