"""Every instruction set this CPU has, and AMX with its tiles emulated."""

import coterie

ISAS = list(coterie.cpu.info().isas)
if "avx512_bf16" in ISAS:  # the emulation of AMX's tiles leaves the rest to these
    ISAS.append("amx_emulated")
