"""One self-contained HTML page per run: curves, gates, alarms, plan, before and after, samples."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from fusiontree.errors import DataError, FusionTreeError
from fusiontree.lab import sections
from fusiontree.lab.markup import whole_page
from fusiontree.lab.run_folder import RunFolder, read_run

PARTS = ("config.yaml", "metrics.jsonl", "gates.jsonl", "plan.json", "slim.json")  # any of them makes a run folder
LEARNING = ["loss", "learning_rate", "throughput", "gradient_norm"]
PROBES = ["perplexity", "recall"]
GATES = ["gate_heatmap", "gate_distribution", "gate_by_class", "branch_norms", "branch_norms_by_layer"]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `plots/*.png` into a run folder and return the page's path.

    Parts the run does not have are left out with a line saying so. Raises DataError when `run_dir` is not a run folder
    or cannot be written.
    """
    run = read_run(run_dir)
    if not any((run.path / name).exists() for name in PARTS):
        raise DataError(f"report: {run.path} is not a run folder: none of {', '.join(PARTS)} is in it")
    target = run.path / "report.html"
    try:
        svgs = _draw(run)
        page = _page(run, svgs)
        partial = target.with_suffix(".html.tmp")
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise DataError(f"report: cannot write {error.filename or target}: {error.strerror}") from error
    return target


def _draw(run: RunFolder) -> dict[str, str]:
    """Save each picture as PNG and return it as SVG, by name."""
    if importlib.util.find_spec("matplotlib") is None:
        run.notes.append("pictures: matplotlib is not installed (pip install matplotlib)")
        return {}
    from fusiontree.lab import canvas, plots

    figures = plots.draw(run)
    folder = run.path / "plots"
    if figures:
        folder.mkdir(exist_ok=True)
    svgs = {}
    for name, figure in figures.items():
        canvas.save_png(figure, folder / f"{name}.png")
        svgs[name] = canvas.inline_svg(figure, name, sections.FIGURES[name][0])
    return svgs


def _count_parameters(run: RunFolder) -> int | None:
    """From the model's own accounting, so that the number is right before the first checkpoint."""
    if run.model.get("model_type", "fusiontree") != "fusiontree" or "vocab_size" not in run.model:
        return None
    from fusiontree.models.accounting import account
    from fusiontree.models.config import HybridConfig

    try:
        if run.model_folder is not None:  # config.json writes some numbers its own way, infinity for one
            config = HybridConfig.from_pretrained(run.model_folder, local_files_only=True)
        else:
            config = HybridConfig(**run.model)
        return account(config).total_parameters
    except (FusionTreeError, OSError, TypeError, ValueError) as error:
        run.notes.append(f"parameters cannot be counted: {error}")
        return None


def _page(run: RunFolder, svgs: dict[str, str]) -> str:
    parameters = _count_parameters(run)
    parts = [
        sections.head(run, parameters),
        sections.before_after(run, svgs),
        sections.pictures("Learning", "", LEARNING, svgs, "No curves: <code>metrics.jsonl</code> has no usable line."),
        sections.spike_list(run),
        sections.pictures("Probes", "", PROBES, svgs, "No probes: <code>probes.every</code> was not set."),
        sections.pictures("Gates", "", GATES, svgs, "No gate pictures: <code>gates.jsonl</code> has no usable line."),
        sections.alarm_list(run),
        sections.prune_plan(run.plan),
        sections.generated(run),
        sections.setup(run, parameters),
        sections.notes(run),
    ]
    return whole_page(f"{run.path.resolve().name} · FusionTree run", "".join(parts))
