"""`fusiontree prune`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fusiontree.errors import ConfigError

if TYPE_CHECKING:
    from fusiontree.data import DataConfig


def prune(
    model: Annotated[
        Path, typer.Argument(help="Model folder, or run folder (its newest checkpoint).", show_default=False)
    ],
    max_loss_increase: Annotated[
        float, typer.Option(help="How much the loss may rise in all, in nats per token.", show_default=False)
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out text: file or glob, may be given again; stdlib: its held-out part. None: the run's own.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The plan to write.")] = Path("plan.json"),
    weigh: Annotated[
        Literal["bytes", "flops"], typer.Option(help="What a loss increase is weighed against.")
    ] = "bytes",
    length: Annotated[
        int | None, typer.Option(help="Tokens per row; left out: 512, or all positions of a shorter model.", min=2)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per batch.", min=1)] = 8,
    batches: Annotated[int, typer.Option(help="Batches to measure on.", min=1)] = 16,
) -> None:
    """Take every branch out and measure the loss; write a readable plan of what the budget allows to go."""
    from fusiontree.cli.places import model_folder, run_folder
    from fusiontree.data import build_loader
    from fusiontree.deploy import console_progress, load_model, make_plan, save_plan
    from fusiontree.deploy.loading import load_saved_tokenizer
    from fusiontree.eval.perplexity import evaluate_loss

    folder = model_folder(model)
    config = held_out(data or [], run_folder(model))
    network = load_model(folder)
    longest = network.config.max_position_embeddings
    length = length or min(512, longest)
    if length > longest:
        raise ConfigError(f"--length {length}: this model has {longest} positions; at most {longest} is allowed")
    loader = build_loader(
        config, load_saved_tokenizer(folder), split="validation", sequence_length=length, batch_size=batch_size
    )
    for example in loader.bad_records.examples[:5]:
        typer.echo(f"warning: skipped {example}", err=True)
    rows = list(islice(loader, batches))
    partial = out.with_name(f"{out.name}.measurements.jsonl")
    with console_progress("measuring removals") as progress:
        plan = make_plan(
            network,
            lambda candidate: evaluate_loss(candidate, rows).loss,
            max_loss_increase=max_loss_increase,
            saving=weigh,
            proposal=_proposal(network, rows, run_folder(model)),
            partial_path=partial,
            evaluation_id=f"{loader.fingerprint}:{length}:{batch_size}:{len(rows)}",
            on_progress=progress,
        )
    save_plan(plan, out)
    partial.unlink()
    _tell(plan, out)


def held_out(paths: list[str], run: Path | None) -> DataConfig:
    """Text the model did not learn from: the files named, or what the run of the model held out."""
    from fusiontree.cli.sources import sources
    from fusiontree.data import DataConfig

    if not paths:
        if run is None:
            raise ConfigError("--data: give files with held-out text; this model lies in no run folder that would tell")
        from fusiontree.train.config import load_config

        section = load_config(run / "config.yaml").data
        return DataConfig(**{name: getattr(section, name) for name in DataConfig.model_fields})
    if paths == ["stdlib"]:
        return DataConfig(train=sources(paths), validation_fraction=_held_out_part(run))
    return DataConfig(validation=sources(paths))


def _held_out_part(run: Path | None) -> float:
    """The fraction that the run held out of its own text, so that nothing it learned from is measured on."""
    from fusiontree.data import DataConfig

    usual: float = DataConfig.model_fields["validation_fraction"].default
    if run is None:
        return usual
    from fusiontree.train.config import load_config

    return load_config(run / "config.yaml").data.validation_fraction or usual


def _proposal(network: Any, rows: list[Any], run: Path | None) -> Any:
    """What the gates say: as the run saw them, else (a short run, or none) on the held-out text."""
    from fusiontree.deploy import observe_gates, propose_from_gates, read_gate_log

    log = None if run is None else run / "gates.jsonl"
    if log is not None and log.is_file() and log.stat().st_size:
        return propose_from_gates(network, read_gate_log(log))
    return propose_from_gates(network, observe_gates(network, rows), minimum_steps=0)


def _tell(plan: Any, out: Path) -> None:
    for entry in plan.layers:
        typer.echo(f"layer {entry.layer}: keep {entry.keep} ({entry.why})")
    saved = sum(entry.bytes_saved for entry in plan.layers)
    typer.echo(
        f"loss {plan.baseline_loss:.4f} → {plan.predicted_loss:.4f} predicted, {saved / 1e6:.1f} MB of weights saved"
    )
    typer.echo(f"plan: {out}")
