"""What was found, for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusiontree.eval.verify.contract import Finding

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {"holds": "green", "broken": "bold red", "not offered": "dim"}


def contract_table(title: str, findings: Sequence[Finding]) -> Table:
    """One line per finding, for the console."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("line", "what", title=escape(title), title_justify="left", box=None, pad_edge=False)
    for head in ("error", "allowed"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for found in findings:
        colour = COLOURS[found.status]
        verdict = f"[{colour}]{found.status}[/{colour}]" + (f": {escape(found.note)}" if found.note else "")
        table.add_row(found.name, escape(found.claim), shown(found.error), _allowed(found), verdict)
    return table


def shown(error: float | None) -> str:
    """Two digits; exact equality is 0."""
    if error is None:
        return "–"
    if math.isinf(error):
        return "not finite"
    return "0" if error == 0 else f"{error:.1e}"


def _allowed(found: Finding) -> str:
    if found.status == "not offered":
        return ""
    return f"{'≥' if found.at_least else '≤'} {found.tolerance:.0e}"
