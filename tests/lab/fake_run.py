"""A made-up run folder that looks like a real one. For tests of the report only: nothing here was measured."""

import json
from pathlib import Path

import numpy as np

from fusiontree.deploy.export import EXPORT_MARK

LAYERS, STEPS, EVERY = 6, 1200, 10

MODEL = {
    "model_type": "fusiontree",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "sliding_window": 128,
    "global_heads": 1,
    "mamba_d_state": 64,
    "gate_rank": 32,
}

CONFIG = """model:
  hidden_size: 256
  num_hidden_layers: 6
  sliding_window: 128
training:
  steps: 1200
  lr: 0.002  # <not a tag>
"""


def write_fake_run(folder: Path, layers: int = LAYERS, steps: int = STEPS) -> Path:
    """Fill `folder` with every file that a finished demo leaves."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    checkpoint = folder / "checkpoints" / f"step-{steps:08d}"
    checkpoint.mkdir(parents=True)
    _dump(checkpoint / "config.json", MODEL | {"num_hidden_layers": layers})
    _dump_lines(folder / "metrics.jsonl", metrics(random, steps))
    _dump_lines(folder / "gates.jsonl", [gate_record(random, step, steps, layers) for step in range(0, steps + 1, 20)])
    _dump_lines(folder / "spikes.jsonl", [spike(step) for step in range(300, 500, 9)])
    _dump(folder / "plan.json", plan(random, layers))
    _dump(folder / "slim.json", {"settings": {}, "rows": SLIM_ROWS})
    _dump(folder / "samples.json", {"samples": SAMPLES})
    _dump(folder / "summary.json", {"step": steps, "validation_loss_before": 8.41, "validation_loss_after": 4.31})
    (folder / "pruned").mkdir()
    (folder / "healing").mkdir()
    _dump(folder / "pruned" / EXPORT_MARK, {"relative_error": 3.2e-7})
    _dump_lines(folder / "healing" / "metrics.jsonl", healing(random))
    return folder


def metrics(random: np.random.Generator, steps: int) -> list[dict]:
    rows: list[dict] = []
    for step in range(EVERY, steps + 1, EVERY):
        t = step / steps
        smooth = 4.2 + 4.2 * np.exp(-t * 7) - 0.35 * t
        loss = smooth + random.normal(0, 0.09)
        lr = 0.002 * min(1.0, step / 100) * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * t)))
        norm = 0.4 + 1.5 * np.exp(-t * 9) + abs(random.normal(0, 0.06))
        rate = 8600 + random.normal(0, 160) - (900 if step % 200 == 0 else 0)
        row = {"step": step, "loss": loss + 0.01, "lm_loss": loss, "balance_loss": 0.004 * (1 - t)}
        row |= {"entropy_loss": 0.006, "lr": lr, "grad_norm": norm, "gate_mean": 0.5 + 0.06 * t, "memory_gb": 1.9}
        rows.append(row | {"tokens": step * 4096, "tokens_per_second": rate, "elapsed": step * 4096 / 8600})
        if step % 100 == 0:
            rows.append(validation(step, smooth + 0.08))
            rows.append(probe(step, smooth, t))
    return [validation(0, 8.41), *rows]


def healing(random: np.random.Generator) -> list[dict]:
    losses = 4.3 + 0.25 * np.exp(-np.arange(60) / 9) + random.normal(0, 0.03, 60)
    return [{"step": step + 1, "loss": loss + 0.4, "lm_loss": loss} for step, loss in enumerate(losses)]


def validation(step: int, loss: float) -> dict:
    return {"step": step, "validation_loss": loss, "validation_perplexity": float(np.exp(loss))}


def probe(step: int, loss: float, t: float) -> dict:
    lengths = {f"perplexity/{length}": float(np.exp(loss + 20 / length)) for length in (128, 512, 2048)}
    return {"step": step} | lengths | {f"recall/{pairs}": t * 4 / (pairs + 1) for pairs in (4, 16, 64)}


def spike(step: int) -> dict:
    documents = [f"/data/<web>.jsonl:{line}" for line in range(40, 47)]
    figures = {"loss": 11.25, "usual_loss": 4.5, "grad_norm": 31.0, "usual_grad_norm": 0.5}
    return {"step": step, **figures, "samples": [8 * step, 8 * step + 1], "documents": documents}


def gate_record(random: np.random.Generator, step: int, steps: int, layers: int) -> dict:
    t = step / steps
    entries = []
    for layer in range(layers):
        drift = 0.34 * np.sin(layer * 2.1 + 0.6) * (1 - np.exp(-3 * t))
        values = np.clip(random.normal(0.5 + drift, 0.03 + 0.1 * t, 4000), 0.001, 0.999)
        norms = {"mamba_rms": 0.9 + 0.5 * t + 0.2 * drift, "attention_rms": 0.7 + 0.3 * t - 0.5 * drift}
        kinds = zip(("space", "word", "number", "punctuation"), (-0.08, 0.01, 0.06, -0.03), strict=True)
        classes = {"classes": {kind: float(values.mean()) + shift for kind, shift in kinds}}
        channels = random.normal(0.5 + drift, 0.05, 64).round(3).tolist()
        entries.append({"layer": layer} | norms | summary(values) | {"channel_mean": channels} | classes)
    alarms = []
    if 200 < step < 420:
        message = "layer 1: gates collapsed to Mamba (mean 0.971)"
        advice = "Raise training.loss.balance_weight, or let it specialise & prune."
        alarms = [{"layer": 1, "kind": "collapsed", "message": message, "advice": advice}]
        alarms += [alarms[0] | {"layer": 4, "message": message.replace("1", "4", 1)}] * (step > 300)
    return {"step": step, "layers": entries, "alarms": alarms}


def summary(values: np.ndarray) -> dict:
    names = {"p05": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95}
    percentiles = {name: float(np.percentile(values, q)) for name, q in names.items()}
    entropy = float(-(values * np.log(values) + (1 - values) * np.log(1 - values)).mean())
    histogram = np.histogram(values, bins=20, range=(0, 1))[0].tolist()
    extremes = {"min": float(values.min()), "max": float(values.max()), "entropy": entropy, "histogram": histogram}
    return {"mean": float(values.mean()), "std": float(values.std())} | percentiles | extremes


def plan(random: np.random.Generator, layers: int) -> dict:
    entries, total = [], 0.0
    for layer in range(layers):
        gate = 0.5 + 0.34 * np.sin(layer * 2.1 + 0.6)
        increase = {"mamba": 0.02 + 0.6 * gate**3, "attention": 0.003 + 0.5 * (1 - gate) ** 3}
        cheapest = min(increase, key=increase.__getitem__)
        removed = bool(increase[cheapest] < 0.02)
        keep = {"mamba": "attention", "attention": "mamba"}[cheapest] if removed else "both"
        total += increase[cheapest] if removed else 0.0
        verdict = "within the budget" if removed else "over the budget"
        why = f"removing {cheapest} costs {increase[cheapest]:+.4f}, {verdict}"
        saved = {"bytes_saved": 1_310_720 * removed, "flops_saved_per_token": 655_360 * removed}
        entries.append({"layer": layer, "keep": keep, "why": why, "gate_mean": gate, "loss_increase": increase} | saved)
    model = {"fingerprint": "0" * 64, "num_hidden_layers": layers, "hidden_size": 256}
    head = {"format": "fusiontree-prune-plan", "version": 1, "model": model, "budget": {"max_loss_increase": 0.05}}
    return head | {"baseline_loss": 4.3121, "predicted_loss": 4.3121 + total, "layers": entries}


def _slim(name: str, parameters: int, loss: float, prefill: float, decode: float) -> dict:
    sizes = {"name": name, "parameters": parameters, "bytes": parameters * 4, "validation_loss": loss}
    return sizes | {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}


SLIM_ROWS = [
    _slim("full", 7_214_336, 4.3121, 18_240.0, 92.4),
    _slim("pruned", 6_231_296, 4.3394, 21_870.0, 118.9),
    _slim("healed", 6_231_296, 4.3052, 21_902.0, 118.1),
]

SAMPLES = [
    {
        "prompt": "def read_lines(path):\n    with open(path) as",
        "completions": {
            "full": " f:\n        return f.read()\n\n    def __init__(self, path):\n        self.path = path\n",
            "pruned": " f:\n        return f.readlines()\n\n    def close(self):\n        self.path = None\n",
            "healed": " f:\n        for line in f:\n            yield line\n",
        },
    },
    {
        "prompt": "class <script>alert('x')</script> & Node:\n    def __init__(self",
        "completions": {"full": ", parent=None):\n        self.parent = parent", "pruned": "):\n        pass"},
    },
]


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _dump_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    import sys

    from fusiontree.lab.report import write_report

    print(write_report(write_fake_run(Path(sys.argv[1]))))
