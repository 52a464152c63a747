"""Tables of text."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Rows, the first of them the heading, as aligned columns or in Markdown."""
    if markdown:
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([head, "| --- " * len(rows[0]) + "|", *body])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
