"""Gathers what docs/results.md shows from the folders of runs and evaluations, as docs/results/*.json.

python scripts/results_collect.py RATES RUNS EVALUATIONS SPEED

RATES holds MODEL-RATE, short runs of small models; RUNS holds MODEL, the runs; EVALUATIONS holds MODEL/FOLDER as
scripts/results_eval.sh fills it; SPEED is the output of `fusiontree bench` on the models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusiontree.models import account
from fusiontree.train.build import model_config
from fusiontree.train.config import load_config

OUT = Path(__file__).resolve().parent.parent / "docs" / "results"
KEPT = ("version", "main_metric", "metrics", "errors", "tables", "samples", "settings", "command", "commit", "date")


def main() -> None:
    """Write training.json and one file for each model."""
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    rates, runs, evaluations, speed = map(Path, sys.argv[1:])
    write("training", {key: [*map(training, sorted(at.iterdir()))] for key, at in (("rates", rates), ("runs", runs))})
    for folder in sorted(path for path in evaluations.iterdir() if path.is_dir()):
        write(folder.name, evaluation(folder))
    write("speed", speeds(json.loads((speed / "results.json").read_text(encoding="utf-8"))))


def training(folder: Path) -> dict[str, Any]:
    """One run: its model, its settings and its curve."""
    run = load_config(folder / "config.yaml")
    config = model_config(run)
    lines = list(read_lines(folder / "metrics.jsonl"))
    losses = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "validation_loss" in line]
    return {
        "name": folder.name.split("-")[0],
        "parameters": account(config).total_parameters,
        "layers": config.num_hidden_layers,
        "lr": run.training.lr,
        "steps": losses[-1]["step"],
        "tokens": losses[-1]["tokens"],
        "seconds": round(losses[-1]["elapsed"]),
        "curve": [[line["step"], round(line["lm_loss"], 4)] for line in losses],
        "validation": [[line["step"], round(line["validation_loss"], 4)] for line in checks],
    }


def speeds(found: dict[str, Any]) -> dict[str, Any]:
    """The rows without their raw times, and what they were measured on."""
    rows = [
        {**row, "speed": {k: v for k, v in row["speed"].items() if not isinstance(v, list)}} for row in found["rows"]
    ]
    return {**{key: found[key] for key in ("machine", "versions", "commit", "new_tokens", "repeats")}, "rows": rows}


def evaluation(folder: Path) -> dict[str, Any]:
    """The results of one model, by FOLDER/TASK; perplexity with its windows, so that models can be compared on each."""
    content: dict[str, Any] = {"tasks": {}}
    for path in sorted(folder.glob("*/results.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        content["model"] = {key: value for key, value in found["model"].items() if key != "name"}
        for task, result in found["tasks"].items():
            entry = {key: result[key] for key in KEPT}
            entry["settings"] = {key: value for key, value in entry["settings"].items() if value not in (None, [], {})}
            entry["settings"].pop("data", None)  # a path of the machine
            entry["command"] = entry["command"].split(" --tasks ")[-1]
            content |= {"machine": result["machine"], "versions": result["versions"]}
            if task == "perplexity":
                entry["windows"] = windows(path.parent / "samples" / "perplexity.jsonl")
            content["tasks"][f"{path.parent.name}/{task}"] = entry
    return content


def windows(path: Path) -> dict[str, list[list[float]]]:
    """Length -> nats and bytes of each window."""
    found: dict[str, list[list[float]]] = {}
    for line in read_lines(path):
        if "nats" in line:
            found.setdefault(str(line["length"]), []).append([round(line["nats"], 3), int(line["bytes"])])
    return found


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON lines file."""
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def write(name: str, content: dict[str, Any]) -> None:
    """Lists of numbers on one line, everything else indented."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
