"""Small pieces of HTML. Every text from a run folder passes through `esc`."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from importlib import resources

# Nothing may be loaded from anywhere, whatever text a run folder carries.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
ABSENT = '<span class="none">–</span>'


def esc(value: object) -> str:
    """Text that is safe inside elements and quoted attributes."""
    return html.escape(str(value), quote=True)


def whole_page(title: str, body: str) -> str:
    """A self-contained page around ready HTML, in the look of report.css; `title` is plain text."""
    style = resources.files("fusiontree.lab").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def figure(title: str, svg: str, caption: str) -> str:
    """A picture with its title and what to see in it."""
    return f"<figure><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def tag(name: str, body: str, css: str = "") -> str:
    """An element around ready HTML."""
    attribute = f' class="{css}"' if css else ""
    return f"<{name}{attribute}>{body}</{name}>"


def section(title: str, lead: str, body: str) -> str:
    """A titled part of the page; `lead` is one plain sentence of what to look for."""
    return f"<section><h2>{esc(title)}</h2>{tag('p', lead, 'lead') if lead else ''}{body}</section>"


def absent(message: str) -> str:
    """The line that stands where a part of the run is missing."""
    return tag("p", message, "absent")


def table(head: Iterable[str], rows: Iterable[Iterable[str]], css: str = "") -> str:
    """A table of ready HTML cells in a box that scrolls sideways on a narrow screen; the first column is a header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = ""
    for first, *others in rows:
        body += f'<tr><th scope="row">{first}</th>' + "".join(tag("td", cell) for cell in others) + "</tr>"
    content = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0">{tag("table", content, css)}</div>'


def bar(share: float, colour: str) -> str:
    """A thin bar, `share` in [0, 1] of its cell."""
    width = 0.0 if math.isnan(share) else 100 * min(max(share, 0.0), 1.0)
    return f'<span class="bar"><i style="width:{width:.1f}%;background:var(--{colour})"></i></span>'


def fixed(value: float, digits: int = 4, sign: bool = False) -> str:
    """A decimal number, or a dash for NaN."""
    return ABSENT if math.isnan(value) else f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def scaled(value: float, unit: str = "") -> str:
    """1 234 567 → 1.23 M: three digits and a decimal prefix."""
    if math.isnan(value):
        return ABSENT
    for size, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 7 min 5 s, 3 h 12 min."""
    if math.isnan(seconds):
        return ABSENT
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
