"""The main job from end to end, in minutes on a laptop: text in; trained, watched, pruned, exported, healed model out.

Everything lands in one run folder. A stage whose output is there is kept, so a demo that was interrupted goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fusiontree.data import build_loader, load_tokenizer
from fusiontree.deploy import InferenceRuntime, console_progress, load_model, propose_from_gates, read_gate_log
from fusiontree.deploy.export import EXPORT_MARK
from fusiontree.deploy.files import write_json
from fusiontree.deploy.progress import ProgressFn
from fusiontree.errors import CheckpointError, ConfigError
from fusiontree.eval.perplexity import evaluate_loss
from fusiontree.eval.system import measure_speed
from fusiontree.lab.report import write_report
from fusiontree.models.json_files import read_json, read_json_lines
from fusiontree.recipes.pace import Pace, find_pace
from fusiontree.recipes.probes import training_probes
from fusiontree.recipes.slim import SlimResult, healing_config, slim, slim_table
from fusiontree.train import RunConfig, latest_checkpoint, load_config, train

SETTINGS_FILE = "demo.json"
SAMPLES_FILE = "samples.json"
MAX_FILE_BYTES = 16 << 20
TINY_PACE = Pace(steps=12, healing_steps=2, measured_batches=1, precision="bf16")
PROMPTS = (
    "def read_lines(path):",
    "class Node:\n    def __init__(self,",
    "import os\nimport sys\n\n\ndef main():",
)


class Sizes(NamedTuple):
    """What tells a real demo from the tiny one that tests run."""

    overrides: list[str]
    max_loss_increase: float
    prompt_length: int
    new_tokens: int
    repeats: int


FULL = Sizes([], max_loss_increase=0.1, prompt_length=512, new_tokens=64, repeats=3)
TINY = Sizes(
    [
        "model={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, sliding_window: 16, mamba_head_dim: 16,"
        " mamba_d_state: 8, gate_rank: 4, max_position_embeddings: 256}",
        "training.sequence_length=64",
        "training.micro_batch_size=2",
        "training.validation_batches=2",
        f"data.train.0.path={Path(json.__file__).parent}/*.py",  # a handful of the same library's files
        "data.tokenizer.train_vocab_size=512",
    ],
    max_loss_increase=10.0,
    prompt_length=16,
    new_tokens=8,
    repeats=1,
)


def run_demo(out: Path, *, minutes: float = 10.0, tiny: bool = False, console: Console | None = None) -> Path:
    """Run whatever stages are not finished in `out` and return the report's path.

    `minutes` bounds the whole on this machine. Raises ConfigError when `out` was begun with another `tiny`;
    KeyboardInterrupt, with how to go on, when training is stopped.
    """
    console = console or Console()
    sizes = TINY if tiny else FULL
    pace = _settled_pace(out, minutes, tiny, sizes, console)
    config = demo_config(out, sizes, pace)
    console.rule("[bold]1 · train a tokenizer and a model, watch the gates")
    checkpoint = _train(config, out, console)
    console.print(gate_table(out))
    console.rule("[bold]2 · measure removals, plan, export, heal, compare")
    result = _slim(config, checkpoint, out, sizes, pace, console)
    _show_slim(result, console)
    console.rule("[bold]3 · complete a few lines of Python")
    _show_samples(_samples(result, out, sizes, console), console)
    console.rule("[bold]4 · report")
    report = write_report(out)
    console.print(f"everything is in {out}; open {report}", soft_wrap=True, highlight=False)
    return report


def demo_config(out: Path, sizes: Sizes = FULL, pace: Pace | None = None) -> RunConfig:
    """The run: the shipped demo settings, in the folder `out`, with as many steps as fit."""
    overrides = [f"system.run_dir={json.dumps(str(out))}", f"data.cache_dir={json.dumps(str(out / 'cache'))}"]
    if pace is not None:
        often = max(1, pace.steps // 5)
        overrides += [f"training.steps={pace.steps}", f"training.warmup_steps={pace.steps // 10}"]
        overrides += [f"training.save_every={often}", f"training.validation_every={often}"]
        overrides += [f"training.precision={pace.precision}", f"gate_monitor.every={max(1, pace.steps // 20)}"]
    with resources.as_file(resources.files("fusiontree.recipes").joinpath("demo.yaml")) as settings:
        return load_config(settings, [*overrides, *sizes.overrides])


def _settled_pace(out: Path, minutes: float, tiny: bool, sizes: Sizes, console: Console) -> Pace:
    """The pace of the first start: another number of steps would be another run."""
    path = out / SETTINGS_FILE
    if path.exists():
        settings = read_json(path, MAX_FILE_BYTES, CheckpointError)
        if settings["tiny"] != tiny:
            raise ConfigError(
                f"{out}: was begun {'with' if settings['tiny'] else 'without'} --tiny; give another --out"
            )
        console.print(f"going on with the demo in {out}", soft_wrap=True)
        return Pace(**settings["pace"])
    pace = TINY_PACE
    if not tiny:
        with console.status("timing this machine"):
            config = demo_config(out, sizes)
            vocabulary = config.data.tokenizer.train_vocab_size
            sized = config.model_copy(update={"model": {**config.model, "vocab_size": vocabulary}})
            pace = find_pace(sized, 60 * minutes)
        console.print(
            f"{minutes:g} minutes here: {pace.steps} training steps in {pace.precision}, {pace.healing_steps} to heal"
        )
    write_json(path, {"minutes": minutes, "tiny": tiny, "pace": asdict(pace)}, CheckpointError)
    return pace


def _train(config: RunConfig, out: Path, console: Console) -> Path:
    """Train, or find that it is done; the newest checkpoint."""
    result = train(config, evaluate=evaluate_loss, probes=training_probes(config))
    if result.interrupted:
        raise KeyboardInterrupt(f"interrupted at step {result.step}; run the same command again to go on from there")
    checkpoint = latest_checkpoint(out)
    if checkpoint is None:
        raise CheckpointError(f"{out / 'checkpoints'}: no checkpoint verifies; remove {out} and start again")
    before, after = result.validation_loss_before, result.validation_loss_after
    console.print(f"validation loss [bold]{before:.3f} → {after:.3f}[/bold] nats per token")
    return checkpoint


def gate_table(out: Path) -> Table:
    """The newest gate statistics, a line per layer."""
    record = read_json_lines(out / "gates.jsonl", CheckpointError)[-1]
    table = Table(title=f"Gates at step {record['step']} (1 = all Mamba, 0 = all attention)")
    for name in ("layer", "mean", "5% to 95%", "Mamba rms", "attention rms", "alarm"):
        table.add_column(name, justify="left" if name == "alarm" else "right")
    alarms = {alarm["layer"]: alarm["kind"] for alarm in record["alarms"]}
    for row in record["layers"]:
        spread = f"{row['p05']:.2f} to {row['p95']:.2f}"
        norms = f"{row['mamba_rms']:.3f}", f"{row['attention_rms']:.3f}"
        table.add_row(str(row["layer"]), f"{row['mean']:.3f}", spread, *norms, alarms.get(row["layer"], ""))
    return table


def _slim(config: RunConfig, checkpoint: Path, out: Path, sizes: Sizes, pace: Pace, console: Console) -> SlimResult:
    """Prune by measured removal on held-out text, heal, and measure the three models in turns."""
    shape = {"sequence_length": config.training.sequence_length, "batch_size": config.training.micro_batch_size}
    loader = build_loader(config.data, load_tokenizer(checkpoint), split="validation", **shape)
    batches = list(islice(loader, pace.measured_batches))
    autocast = torch.bfloat16 if pace.precision == "bf16" else None
    proposal = propose_from_gates(load_model(checkpoint), read_gate_log(out / "gates.jsonl"))
    lr = config.training.lr / 4
    speed = partial(
        measure_speed, prompt_length=sizes.prompt_length, new_tokens=sizes.new_tokens, repeats=sizes.repeats
    )
    with bar_while_busy("measuring removals", console) as progress:
        return slim(
            checkpoint,
            out,
            lambda model: evaluate_loss(model, batches, autocast=autocast).loss,
            max_loss_increase=sizes.max_loss_increase,
            healing=healing_config(config, checkpoint, steps=pace.healing_steps, lr=lr),
            measure_speed=speed,
            proposal=proposal,
            evaluation_id=f"{loader.fingerprint}:{len(batches)}",
            on_progress=progress,
        )


@contextmanager
def bar_while_busy(title: str, console: Console) -> Iterator[ProgressFn]:
    """`console_progress` that leaves the screen whenever its work is done: healing then draws a bar of its own."""
    show: ProgressFn | None = None
    with ExitStack() as stack:

        def update(done: int, total: int, text: str) -> None:
            nonlocal show
            show = show or stack.enter_context(console_progress(title, console))
            show(done, total, text)
            if done >= total:
                stack.close()
                show = None

        yield update


def _show_slim(result: SlimResult, console: Console) -> None:
    for entry in result.plan.layers:
        console.print(f"layer {entry.layer}: keep [bold]{entry.keep}[/bold] ({entry.why})", highlight=False)
    record = read_json(result.folders["pruned"] / EXPORT_MARK, MAX_FILE_BYTES, CheckpointError)
    error = record["relative_error"]
    proof = f"largest relative difference of the logits {error:.1e}" if error else "the logits agree bit for bit"
    console.print(f"the export equals the masked original: {proof}")
    console.print(slim_table(result.rows))


def _samples(result: SlimResult, out: Path, sizes: Sizes, console: Console) -> list[dict[str, Any]]:
    """What each model writes after each prompt; kept in samples.json."""
    path = out / SAMPLES_FILE
    if path.exists():
        samples: list[dict[str, Any]] = read_json(path, MAX_FILE_BYTES, CheckpointError)["samples"]
        return samples
    samples = [{"prompt": prompt, "completions": {}} for prompt in PROMPTS]
    for name, folder in result.folders.items():
        with console.status(f"{name} writes"):
            texts = InferenceRuntime(folder).generate(
                list(PROMPTS), max_new_tokens=sizes.new_tokens, temperature=0.6, top_p=0.9, repetition_penalty=1.1
            )
        for sample, text in zip(samples, texts, strict=True):
            sample["completions"][name] = text
    write_json(path, {"samples": samples}, CheckpointError)
    return samples


def _show_samples(samples: list[dict[str, Any]], console: Console) -> None:
    for sample in samples:
        for name, text in sample["completions"].items():
            console.print(f"[bold]{name}[/bold]")
            console.print(sample["prompt"] + text, markup=False, highlight=False)
            console.print()
