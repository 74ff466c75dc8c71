"""The report of a grid: report.md with tables and pictures, report.html in one file, and the tables on the screen."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fusiontree.errors import DataError
from fusiontree.eval.journal import write_whole
from fusiontree.lab.grid.folder import FILE, Content, read_results
from fusiontree.lab.grid.tables import Table, tables
from fusiontree.lab.grid.view import View
from fusiontree.lab.markup import absent, esc, figure, section, table, tag, whole_page

FIGURES = {
    "loss_curves": ("Loss while training", "Running mean of the training loss, first seed."),
    "loss_by_length": ("Loss by length", "The same held-out text in longer rows; the leftmost point is as trained."),
    "memory_by_length": ("Memory by length", "Bytes of keys, values and states of one row in bf16, counted."),
    "effects": ("Effects", "Change of the loss by each change, with its standard error."),
}
TITLES = {"compare": "Architectures side by side", "ablate": "One change at a time"}


def write_grid_report(out: str | Path) -> list[Path]:
    """Write report.md, report.html and plots/*.png of the grid in a folder; their paths, the HTML first.

    ConfigError when no grid is there, DataError when it cannot be written.
    """
    folder = Path(out)
    view = View(read_results(folder / FILE))
    found = tables(view)
    pictures = _pictures(view, folder)
    page, text = folder / "report.html", folder / "report.md"
    write_whole(page, _html(view, found, pictures))
    write_whole(text, markdown(view, found, list(pictures)))
    return [page, text, *(folder / "plots" / f"{name}.png" for name in pictures)]


def _pictures(view: View, folder: Path) -> dict[str, str]:
    """Each picture saved as PNG, and as SVG by name; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    from fusiontree.lab import canvas
    from fusiontree.lab.grid import plots

    svgs = {}
    try:
        for name, drawn in plots.draw(view, folder).items():
            (folder / "plots").mkdir(exist_ok=True)
            canvas.save_png(drawn, folder / "plots" / f"{name}.png")
            svgs[name] = canvas.inline_svg(drawn, name, FIGURES[name][0])
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be written: {error.strerror}") from error
    return svgs


def summary(view: View) -> str:
    """One sentence: what was done and what is missing."""
    done, wanted = len(view.content["runs"]), len(view.names) * len(view.grid["seeds"])
    training = view.grid["training"]
    sentence = (
        f"{len(view.names)} architectures, {len(view.grid['seeds'])} seeds, rows of {training['sequence_length']} "
        f"tokens, {training['micro_batch_size'] * training['accumulation_steps']} rows per step."
    )
    return sentence if done >= wanted else f"{sentence} {done} of {wanted} runs are finished."


def origins(content: Content) -> list[str]:
    """Machine, versions, commit and command of every start."""
    lines = []
    for start in content["started"]:
        machine, versions = start["machine"], start["versions"]
        where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['device']}"
        made = f"commit {start['commit'] or 'unknown'}, torch {versions['torch']}"
        line = f"{start['date']}: {where}; {made}; {start['command'] or 'called from Python'}"
        if line not in lines:
            lines.append(line)
    return lines


def markdown(view: View, found: list[Table], pictures: list[str]) -> str:
    """The report as Markdown."""
    lines = [f"# {TITLES[view.content['kind']]}", "", summary(view), ""]
    for each in found:
        lines += [f"## {each.title}", "", each.lead, "", *markdown_table(each), ""]
    if pictures:
        lines += ["## Pictures", ""]
        for name in pictures:
            title, caption = FIGURES[name]
            lines += [f"![{title}](plots/{name}.png)", "", caption, ""]
    lines += ["## Where it was measured", "", *(f"- {_cell(line)}" for line in origins(view.content)), ""]
    return "\n".join(lines)


def markdown_table(each: Table) -> list[str]:
    """Lines of a pipe table."""
    rows = [each.head, ["---", *["---:"] * (len(each.head) - 1)], *each.rows]
    return ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _html(view: View, found: list[Table], pictures: dict[str, str]) -> str:
    title = TITLES[view.content["kind"]]
    head = f'<p class="eyebrow">FusionTree laboratory</p><h1>{title}</h1>{tag("p", esc(summary(view)), "lead")}'
    cards = "".join(figure(FIGURES[name][0], svg, FIGURES[name][1]) for name, svg in pictures.items())
    gallery = tag("div", cards, "grid") if cards else absent("matplotlib is not installed: no pictures.")
    parts = [tag("header", head), section("Pictures", "", gallery)]
    for each in found:
        rows = [[esc(cell) for cell in row] for row in each.rows]
        parts.append(section(each.title, esc(each.lead), table([esc(cell) for cell in each.head], rows, "numbers")))
    starts = tag("ul", "".join(tag("li", esc(line)) for line in origins(view.content)), "notes")
    parts.append(section("Where it was measured", "", starts))
    return whole_page(f"{title} · FusionTree", "".join(parts))
