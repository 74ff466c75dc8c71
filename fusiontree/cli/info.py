"""`fusiontree info`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fusiontree.cli.values import amount
from fusiontree.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from fusiontree.models.accounting import Accounting
    from fusiontree.models.config import HybridConfig
    from fusiontree.train.config import RunConfig
    from fusiontree.train.forecast import Forecast

WITHOUT_TOKENIZER = 32000
UNITS = ("B", "KB", "MB", "GB", "TB")


class Device(str, Enum):
    """Where a run computes."""

    cuda = "cuda"
    cpu = "cpu"


def info(
    target: Annotated[
        str | None,
        typer.Argument(
            help="Config (YAML), model folder, or run folder.", metavar="CONFIG_OR_CHECKPOINT", show_default=False
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the config's or the preset's."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A named architecture, in place of a config.", show_default=False)
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(help="Size to solve the preset's widths and depth for: 350K, 10M, 1.5B.", show_default=False),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a cache; left out: a config's sequence_length, else 1024.", min=1)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows of a cache; left out: a config's micro_batch_size, else 1.", min=1)
    ] = None,
    processes: Annotated[int, typer.Option(help="Of the training that the config describes.", min=1)] = 1,
    device: Annotated[Device, typer.Option(help="What it trains on.")] = Device.cuda,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, sizes in bytes.")] = False,
) -> None:
    """Parameters per part, FLOPs per token, bytes of weights and states, training memory; nothing is built."""
    import json

    from rich.console import Console
    from rich.markup import escape

    from fusiontree.models.accounting import account

    settings = overrides or []
    if preset is not None:
        found, title = of_preset(preset, params, settings if target is None else [target, *settings]), preset
    elif target is None or params is not None:
        raise ConfigError(
            "info: give a config or a model folder, or --preset NAME, with --params where it is to be solved"
        )
    else:
        found, title = read_target(Path(target), settings), target
    counted = account(found.config, length=length or found.length, batch_size=batch_size or found.rows)
    coming = None if found.run is None else forecast_of(found.run, found.config, processes, device.value)
    if as_json:
        typer.echo(json.dumps(facts(counted, coming), indent=2))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{escape(title)}[/bold]: {describe(found.config)}", soft_wrap=True)
    if found.note:
        console.print(found.note, soft_wrap=True)
    tables = [parameter_table(counted), memory_table(counted), layer_table(counted)]
    for table in [*tables, *([] if coming is None else [training_table(coming)])]:
        console.print(table)


class Target(NamedTuple):
    """A model configuration, the shape of its batches, and a remark on where a number in it comes from."""

    config: HybridConfig
    length: int = 1024
    rows: int = 1
    note: str = ""
    run: RunConfig | None = None


def read_target(target: Path, overrides: Sequence[str] = ()) -> Target:
    """What a YAML config, a model folder or a run folder stands for; a FusionTreeError when it is none of them."""
    if target.is_dir():
        if overrides:
            raise ConfigError(f"{overrides[0]}: {target} is a model; only a config's settings can be changed")
        return Target(_of_folder(target))
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{target}: not a YAML config, a model folder or a run folder")
    from fusiontree.data.tokenizer import BYTE, SMALLEST_VOCABULARY
    from fusiontree.train.build import model_config
    from fusiontree.train.config import load_config

    run = load_config(target, overrides)
    shape = (run.training.sequence_length, run.training.micro_batch_size)
    if "vocab_size" in run.model:
        return Target(model_config(run), *shape, run=run)
    size, origin = run.data.tokenizer.train_vocab_size, "of the tokenizer that this config trains"
    if run.data.tokenizer.path == BYTE:
        size, origin = SMALLEST_VOCABULARY, "one id per byte, the end and padding"
    if size is None:
        size, origin = WITHOUT_TOKENIZER, "assumed: the tokenizer, which is not read here, decides"
    sized = run.model_copy(update={"model": {**run.model, "vocab_size": size}})
    return Target(model_config(sized), *shape, f"vocabulary {size:,}: {origin}", run)


def of_preset(name: str, params: str | None, overrides: Sequence[str]) -> Target:
    """A preset with `KEY=VALUE` settings of the model, in the size asked for."""
    from fusiontree.models.presets import preset
    from fusiontree.models.solve import solve
    from fusiontree.train.yaml_files import parse_value

    settings = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not text.strip():
            raise ConfigError(f"{override!r}: with --preset, settings are KEY=VALUE, for example vocab_size=8192")
        settings[key.strip().removeprefix("model.")] = parse_value(text, f"override {override!r}")
    if params is None:
        return Target(preset(name, **settings))
    solved = solve(name, params=amount("--params", params), **settings)
    return Target(solved.config, note=str(solved))


def _of_folder(folder: Path) -> HybridConfig:
    from transformers import PreTrainedConfig

    from fusiontree.cli.places import model_folder
    from fusiontree.models.config import HybridConfig

    place = model_folder(folder)
    try:
        content, _ = PreTrainedConfig.get_config_dict(place, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place}: no readable config.json: {error}") from None
    kind = content.get("model_type")
    if kind != HybridConfig.model_type:
        raise CheckpointError(
            f"{place}: config.json has model_type {kind!r}; only {HybridConfig.model_type!r} is allowed"
        )
    return HybridConfig.from_dict(content)


def forecast_of(run: RunConfig, model: HybridConfig, processes: int, device: str) -> Forecast:
    """Of a run's training; a teacher's folder, when there is one, is read for its size."""
    from fusiontree.train.forecast import forecast

    teacher = None if run.training.teacher is None else _of_folder(Path(run.training.teacher))
    return forecast(run, model, processes, device, teacher)


def facts(counted: Accounting, coming: Forecast | None) -> dict[str, Any]:
    """All figures as JSON has them."""
    training = None
    if coming is not None:
        training = {**asdict(coming), "total": coming.total}
    return {
        "parameters": counted.parameters,
        "total_parameters": counted.total_parameters,
        "flops_per_token": counted.flops_per_token,
        "weight_bytes": {"float32": counted.weight_bytes(4), "bfloat16": counted.weight_bytes(2)},
        "cache": {"rows": counted.batch_size, "length": counted.length, "bytes": counted.state_bytes},
        "training": training,
    }


def describe(config: HybridConfig) -> str:
    """One line: size and kinds of layers."""
    kinds = [" + ".join(spec.mixers) for spec in config.layer_specs]
    counts = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    sizes = f"{config.num_attention_heads} heads, inner {config.intermediate_size}, vocabulary {config.vocab_size:,}"
    return f"hidden {config.hidden_size}, {config.num_hidden_layers} layers ({counts}), {sizes}"


def parameter_table(counted: Accounting) -> Table:
    """Parameters and forward FLOPs per token, by part."""
    table = _table("part", "parameters", "share", "FLOPs/token")
    total = counted.total_parameters
    for part, count in counted.parameters.items():
        flops = counted.flops.get(part, 0)
        if count or flops:
            table.add_row(part, f"{count:,}", f"{count / total:.1%}", f"{flops:,.0f}")
    table.add_section()
    table.add_row("total", f"{total:,}", "100.0%", f"{counted.flops_per_token:,.0f}")
    return table


def memory_table(counted: Accounting) -> Table:
    """Weights, states at the asked length, and training memory."""
    table = _table("memory", "bytes")
    for name, size in (("float32", 4), ("bfloat16", 2)):
        table.add_row(f"weights in {name}", human(counted.weight_bytes(size)))
    table.add_section()
    rows = f"{counted.batch_size} × {counted.length:,} tokens"
    for name, size in counted.state_bytes.items():
        table.add_row(f"state {name}, {rows}", human(size))
    table.add_row(f"state in all, {rows}", human(sum(counted.state_bytes.values())))
    return table


def training_table(coming: Forecast) -> Table:
    """What one process holds at the run's worst moment."""
    stage = coming.stage
    cut = f"{stage.accumulation_steps} × {stage.micro_batch_size} rows of {stage.length:,} tokens"
    table = _table(f"training, each of {coming.processes} on {coming.device}", "bytes")
    for name, size in coming.parts.items():
        if size:
            table.add_row(name, human(size))
    table.add_section()
    table.add_row(f"at most, in the {coming.moment} ({cut}, recomputed: {coming.checkpointing})", human(coming.total))
    for name, size in coming.host.items():
        table.add_row(f"in the host's memory: {name}", human(size))
    return table


def layer_table(counted: Accounting) -> Table:
    """One line per layer; neighbours that are alike share one."""
    table = _table("layer", "block", "mixers", "parameters", "FLOPs/token", "state")
    alike: list[Any] = []
    for layer in [*counted.per_layer, None]:
        if alike and (layer is None or _facts(layer) != _facts(alike[0])):
            first, last = alike[0].layer, alike[-1].layer
            table.add_row(str(first) if first == last else f"{first}–{last}", *_facts(alike[0]))
            alike = []
        alike.append(layer)
    return table


def _facts(layer: Any) -> tuple[str, ...]:
    parameters, state = sum(layer.parameters.values()), sum(layer.state_bytes.values())
    return layer.block, " + ".join(layer.mixers), f"{parameters:,}", f"{layer.flops_per_token:,.0f}", human(state)


def human(size: float) -> str:
    """Bytes with three digits and a unit (powers of 1000)."""
    for unit in UNITS:
        if size < 1000 or unit == UNITS[-1]:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(first, box=None, pad_edge=False, header_style="bold")
    for name in others:
        table.add_column(name, justify="right")
    return table
