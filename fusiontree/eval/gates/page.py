"""One self-contained HTML page of a gate record: hover, tap or focus a token and see the gates of every layer."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from html import escape
from importlib import resources
from typing import Any

PICTURES = {
    "channels": "The mean gate of neighbouring channels: a layer that looks mixed may have channels that chose.",
    "positions": "The mean gate by position in the document. Grey: a layer without a gate.",
}


def gate_page(record: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page. Nothing is loaded from anywhere, and only the page's own script may run, whatever the text says."""
    shown, layers = record["shown"], record["layers"]
    script, style = _resource("gates.js"), _resource("gates.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    figures = "".join(_figure(name, png) for name, png in pictures.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Gates of {escape(record["model"])}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>Gates</h1>
<p class="muted">{escape(record["model"])}: {record["tokens"]:,} tokens read, {len(shown["ids"]):,} of them shown.
A gate of 1 is all <b class="m">Mamba</b>, 0 is all <b class="a">attention</b>.</p>
<h2>Token by token</h2>
<p><label>Tint by <select id="by">{_choices(layers)}</select></label> <span class="muted" id="scale"></span></p>
<div class="reader">
<div id="text" role="group" aria-label="The text; arrow keys go from token to token">{"".join(_tokens(shown))}</div>
<aside id="panel" aria-live="polite">
<h3 id="which">Hover, tap or focus a token</h3>
<div class="muted" id="about">Its gates are shown here, layer by layer.</div>
<div class="ends"><span class="a">attention</span><span class="m">Mamba</span></div>
<ol>{"".join(map(_strip, layers))}</ol>
</aside>
</div>
<h2>Layer by layer</h2>
{_table(record)}
{figures}
</main>
<script type="application/json" id="data">{_data(record)}</script>
<script>{script}</script>
</body>
</html>
"""


def kind_of(layer: Mapping[str, Any]) -> str:
    """What stands where a layer has no gate."""
    if layer["gate"]:
        return "both"
    name = "Mamba" if layer["mixers"] == ["mamba"] else "attention"
    return f"{name} alone" + (" (pruned)" if layer["block"] == "hybrid" else "")


def _resource(name: str) -> str:
    return resources.files("fusiontree.eval.gates").joinpath(name).read_text(encoding="utf-8")


def _choices(layers: Any) -> str:
    gated = [layer["layer"] for layer in layers if layer["gate"]]
    options = "".join(f'<option value="{n}">layer {layer}</option>' for n, layer in enumerate(gated))
    return f'<option value="-1">the mean of all layers</option>{options}'


def _tokens(shown: Mapping[str, Any]) -> Iterator[str]:
    for i, (piece, kind) in enumerate(zip(shown["pieces"], shown["classes"], strict=True)):
        mean = sum(layer[i] for layer in shown["mean"]) / len(shown["mean"])
        visible = escape(piece).replace("\n", '<span class="sign">↵</span>\n') or '<span class="sign">◌</span>'
        label = escape(f"{named(piece)}, token {i}, {kind}, mean gate {mean:.3f}")
        yield (
            f'<span class="t" role="button" tabindex="{0 if i == 0 else -1}" aria-pressed="false" data-i="{i}" '
            f'aria-label="{label}">{visible}</span>'
        )


def named(piece: str) -> str:
    """A token as it can be read out: what cannot be seen has a name."""
    if not piece:
        return "part of a character"
    if not piece.strip():
        return {"\n": "line break", " ": "space", "\t": "tab"}.get(piece, "white space")
    return f"“{piece.strip()}”"


def _strip(layer: Mapping[str, Any]) -> str:
    number = layer["layer"]
    if not layer["gate"]:
        return f'<li><span>layer {number}</span><span class="without">{kind_of(layer)}</span></li>'
    track = '<span class="track"><i></i><b></b></span>'
    return f'<li id="layer-{number}"><span>layer {number}</span>{track}<output>–</output></li>'


def _table(record: Mapping[str, Any]) -> str:
    classes = [name for name, count in record["class_tokens"].items() if count]
    head = ["layer", "branches", "mean", "spread", "5 %", "95 %", *classes]
    rows = []
    for layer in record["layers"]:
        gate = layer["gate"]
        cells = [str(layer["layer"]), kind_of(layer)]
        if gate:
            cells += [f"{gate[key]:.3f}" for key in ("mean", "std", "p05", "p95")]
            cells += [f"{gate['classes'][name]:.3f}" for name in classes]
        cells += ["–"] * (len(head) - len(cells))
        rows.append("<tr>" + f'<th scope="row">{cells[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]))
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "</tr>".join(rows) + "</tr>"
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(name: str, png: bytes) -> str:
    source = base64.b64encode(png).decode()
    title = f"Heat map: layers down, {name} across"
    return (
        f'<figure><img alt="{title}" src="data:image/png;base64,{source}">'
        f"<figcaption>{PICTURES[name]}</figcaption></figure>"
    )


def _data(record: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    shown = record["shown"]
    content = {
        "layers": [layer["layer"] for layer in record["layers"] if layer["gate"]],
        "names": [named(piece) for piece in shown["pieces"]],
        **{key: shown[key] for key in ("classes", "mean", "std")},
    }
    return json.dumps(content, ensure_ascii=True).replace("<", "\\u003c")
