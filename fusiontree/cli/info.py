"""`fusiontree info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fusiontree.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from fusiontree.models.accounting import Accounting
    from fusiontree.models.config import HybridConfig

WITHOUT_TOKENIZER = 32000
UNITS = ("B", "KB", "MB", "GB", "TB")


def info(
    target: Annotated[
        Path,
        typer.Argument(
            help="Config (YAML), model folder, or run folder.", metavar="CONFIG_OR_CHECKPOINT", show_default=False
        ),
    ],
    length: Annotated[
        int | None, typer.Option(help="Tokens per row; left out: a config's sequence_length, else 1024.", min=1)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows; left out: a config's micro_batch_size, else 1.", min=1)
    ] = None,
) -> None:
    """Parameters per part, FLOPs per token, bytes of weights and states, training memory; nothing is built."""
    from rich.console import Console
    from rich.markup import escape

    from fusiontree.models.accounting import account

    found = read_target(target)
    counted = account(found.config, length=length or found.length, batch_size=batch_size or found.rows)
    console = Console(highlight=False)
    console.print(f"[bold]{escape(str(target))}[/bold]: {describe(found.config)}", soft_wrap=True)
    if found.note:
        console.print(found.note, soft_wrap=True)
    for table in (parameter_table(counted), memory_table(counted), layer_table(counted)):
        console.print(table)


class Target(NamedTuple):
    """A model configuration, the shape of its batches, and a remark on where a number in it comes from."""

    config: HybridConfig
    length: int = 1024
    rows: int = 1
    note: str = ""


def read_target(target: Path) -> Target:
    """What a YAML config, a model folder or a run folder stands for; a FusionTreeError when it is none of them."""
    if target.is_dir():
        return Target(_of_folder(target))
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{target}: not a YAML config, a model folder or a run folder")
    from fusiontree.train.build import model_config
    from fusiontree.train.config import load_config

    run = load_config(target)
    shape = (run.training.sequence_length, run.training.micro_batch_size)
    if "vocab_size" in run.model:
        return Target(model_config(run), *shape)
    size, origin = run.data.tokenizer.train_vocab_size, "of the tokenizer that this config trains"
    if size is None:
        size, origin = WITHOUT_TOKENIZER, "assumed: the tokenizer, which is not read here, decides"
    sized = run.model_copy(update={"model": {**run.model, "vocab_size": size}})
    return Target(model_config(sized), *shape, f"vocabulary {size:,}: {origin}")


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


def describe(config: HybridConfig) -> str:
    """One line: size and kinds of layers."""
    kinds = [" + ".join(spec.mixers) for spec in config.layer_specs]
    counts = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    return (
        f"hidden {config.hidden_size}, {config.num_hidden_layers} layers ({counts}), vocabulary {config.vocab_size:,}"
    )


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
    table.add_section()
    for name, size in counted.training_parts.items():
        table.add_row(f"training: {name}{' (about)' if name == 'activations' else ''}", human(size))
    table.add_row("training in all, about", human(sum(counted.training_parts.values())))
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
