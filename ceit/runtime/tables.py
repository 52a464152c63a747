"""The demonstration's table."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show_comparison(comparison: dict[str, Any], console: Console | None = None) -> None:
    """Print what the plain and the fused run came to.

    Args:
        comparison: from `ceit.demo.compare`.
        console: where to; the standard output unless given.
    """
    console = console or Console()
    plain, fused = comparison["plain"], comparison["fused"]
    on_gpu = plain["device"].startswith("cuda")
    table = Table(title=f"CeiT on the digits, {plain['epochs']} epochs on {plain['device']}")
    table.add_column("")
    for kind in ("plain", "fused"):
        table.add_column(kind, justify="right")
    table.add_row("test accuracy", *(f"{run['accuracy']:.2f}%" for run in (plain, fused)))
    table.add_row("images/s, training", *(f"{run['images_per_second']:,.0f}" for run in (plain, fused)))
    memory = [run["peak_memory_mb"] for run in (plain, fused)]
    table.add_row(
        "peak memory, " + ("tensors" if on_gpu else "process"),
        *("unknown" if mb is None else f"{mb:,.0f} MB" for mb in memory),
    )
    table.add_row("what ran", "PyTorch", "\n".join(f"{op}: {_name(by)}" for op, by in fused["fused_operators"].items()))
    console.print()
    console.print(table)
    console.print(
        f"largest difference of the losses: {comparison['early_loss_difference']:.2g} at first, "
        f"{comparison['epoch_loss_difference']:.2g} in the mean of an epoch, "
        f"{comparison['largest_loss_difference']:.2g} in a step (training multiplies rounding)",
        soft_wrap=True,
    )
    fallen_back = {op: by["reason"] for op, by in fused["fused_operators"].items() if by["backend"] == "reference"}
    if fallen_back:
        console.print(
            "In the fused run these operators fell back on plain PyTorch, so they gained no speed and no memory:",
            soft_wrap=True,
        )
        for operator, reason in fallen_back.items():
            console.print(f"  {operator}: {reason}", highlight=False, soft_wrap=True)


def _name(by: dict[str, str]) -> str:
    return "PyTorch" if by["backend"] == "reference" else by["backend"]
