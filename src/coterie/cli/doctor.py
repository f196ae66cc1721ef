"""coterie doctor: what runs here, why, how fast the machine is, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from coterie.cli.console import console, errors, facts, significant, size

if TYPE_CHECKING:
    from coterie.cpu import CpuInfo

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
    report.add_row("int8 dot products", f"{significant(int8 / 1e9)} GOP/s: the limit with int8 and int4 experts")
    console.print(report)

    report = facts("\nVersions")
    found = versions.installed()
    for name, version in found.items():
        report.add_row(name, version)
    console.print(report)

    report = facts("\nGPU")
    for gpu in machine.gpus():
        report.add_row(gpu.name, f"{size(gpu.memory)}, not used by this version")
    if not report.row_count:
        report.add_row("none", "not needed: everything runs on the CPU")
    console.print(report)

    console.print("\n[bold]What to change[/]")
    advice = advise(info, versions.problems(found))
    for line in advice or ["nothing: this machine is used as well as it can be"]:
        console.print(f"- {line}", markup=False, highlight=False)


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
