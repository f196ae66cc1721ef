"""Every instruction set this CPU has, and those that are emulated: AMX's tiles always, more under `make emulate`."""

import coterie
from coterie import _native

ISAS = [*coterie.cpu.info().isas, *_native.emulated_isas()]
