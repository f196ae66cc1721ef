"""coterie doctor: what runs here, why, how fast the machine is, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from coterie.cli.console import console, errors, facts, significant, size

if TYPE_CHECKING:
    from coterie.cpu import CpuInfo
    from coterie.machine import Gpu

THP = "/sys/kernel/mm/transparent_hugepage/enabled"


def doctor() -> None:
    """Show the CPU and the kernels chosen for it, memory, measured speeds, versions, and what to change."""
    with errors.status("importing torch and transformers"):
        from coterie import cpu, machine, memory, versions
    info = cpu.info()

    report = facts("CPU")
    report.add_row("model", escape(info.model))
    report.add_row("kernels", f"[bold]{info.isa}[/]: {escape(info.isa_reason)}")
    report.add_row("this CPU can run", ", ".join(info.isas))
    report.add_row("cores, threads used", f"{info.cores}, {info.threads}")
    report.add_row("NUMA nodes", str(info.numa_nodes))
    if shares := machine.numa_shares():
        report.add_row("experts by node", ", ".join(f"{share:.0%} of what {n} computes" for n, share in shares.items()))
    report.add_row("huge pages", info.huge_pages)
    ram = memory.found()
    report.add_row("memory", f"{size(ram.total)}, {size(ram.available)} available")
    console.print(report)

    with errors.status("measuring memory and arithmetic"):
        bandwidth, bf16, int8 = machine.read_bandwidth(), machine.dot_rate("bf16"), machine.dot_rate("int8")
    report = facts(f"\nMeasured with {info.threads} threads")
    report.add_row("reading memory", f"{significant(bandwidth / 1e9)} GB/s: the limit of decoding")
    report.add_row("bf16 dot products", f"{significant(bf16 / 1e9)} GFLOP/s: the limit of prefill with bf16 experts")
    report.add_row("int8 dot products", f"{significant(int8 / 1e9)} GOP/s: about the limit with int8 and 4-bit experts")
    console.print(report)

    report = facts("\nVersions")
    found = versions.installed()
    for name, version in found.items():
        report.add_row(name, version)
    console.print(report)

    report = facts("\nGPU")
    gpus = machine.gpus()
    for gpu in gpus:
        with errors.status(f"measuring copies to {gpu.name}"):
            to, back = (significant(rate / 1e9) for rate in machine.link_rates(gpu.device))
        memory_of = f"{size(gpu.memory)}, {size(gpu.free)} free"
        report.add_row(
            escape(gpu.name), f"{memory_of}; compute capability {gpu.capability}; {to} GB/s to it, {back} GB/s from it"
        )
    if not gpus:
        report.add_row("none", "not needed: everything runs on the CPU")
    report.add_row("computes", computes(info.isa, gpus, (bandwidth, bf16, int8)))
    console.print(report)

    console.print("\n[bold]What to change[/]")
    advice = advise(info, versions.problems(found))
    for line in advice or ["nothing: this machine is used as well as it can be"]:
        console.print(f"- {line}", markup=False, highlight=False)


def computes(isa: str, gpus: list[Gpu], measured: tuple[float, float, float]) -> str:
    """What will compute what; measured: bytes that the CPU reads and operations of its products in a second."""
    if not gpus:
        return f"the CPU: experts and packed layers by the {isa} kernels, the rest by torch"
    from coterie.bench.shapes import SHAPES
    from coterie.formats import Formats, resolve
    from coterie.gpu import rates

    shape, int4, device = SHAPES["qwen3-30b"], Formats.of(resolve("int4")), gpus[0].device
    layer = rates.Layer(shape.E, int4.expert_nbytes(shape.H, shape.I, True), 3 * shape.H * shape.I)
    with errors.status("measuring how fast experts are sent"):
        found = rates.Rates(*measured, rates.delivered(device), rates.products(device))
    first = found.streams_from(shape.K, layer, integer=True)
    sent = "for no number of tokens" if first is None else f"from {first} tokens on"
    return (
        f'device="cuda": all but the experts on the GPU, the experts on the CPU ({isa} kernels); gpu_experts=N: N of '
        f"each layer's on the GPU; gpu_experts=\"stream\": a layer like Qwen3-30B-A3B's in int4 on the GPU {sent}, "
        f"to which {significant(found.delivered / 1e9)} GB/s of packed experts are brought"
    )


def advise(info: CpuInfo, problems: list[str]) -> list[str]:
    """One line for each thing that makes coterie slower or less certain here than it need be, `problems` last."""
    lines = []
    if info.huge_pages == "never":
        lines.append(f"huge pages are off, which about halves memory speed: echo madvise | sudo tee {THP}")
    best = info.isas[0]
    if info.isa != best:
        lines.append(f"the kernels in use are {info.isa}, this CPU can run {best}: unset COTERIE_ISA")
    if info.threads < info.cores:
        lines.append(f"{info.threads} of {info.cores} cores are used: unset COTERIE_THREADS")
    if info.threads > info.cores:
        lines.append(f"{info.threads} threads share {info.cores} cores: set COTERIE_THREADS={info.cores}")
    if best in ("scalar", "avx2"):
        lines.append("this CPU has no AVX512: prefill will be several times slower than on one that has")
    if info.numa_nodes > 1:
        lines.append(f"{info.numa_nodes} NUMA nodes share the experts; numactl --interleave=all spreads the rest, too")
    return lines + problems
