"""What a grid is: architectures or changes of one, the same text, tokenizer, seeds and budget for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from fusiontree.errors import ConfigError
from fusiontree.lab.grid.changes import named_change
from fusiontree.train.config import DataSection, Section, TrainingSection, parse_settings

Whole = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Settings = dict[str, Any]


class ArchitectureSection(Section):
    """One architecture: a preset and what is changed in it."""

    preset: str | None = None
    """Null: the preset that has the architecture's own name."""
    model: Settings = Field(default_factory=dict)
    """HybridConfig's arguments; they win over the grid's `model` section."""


class MatchSection(Section):
    """In what the architectures are equal."""

    by: Literal["parameters", "tokens", "flops"] = "tokens"
    """parameters: sizes are solved so that all have as many, and all see the same tokens. tokens: sizes as they are
    given, the same tokens. flops: as many steps for each as come to the same training FLOPs."""
    parameters: float | None = Field(default=None, gt=0)
    """Parameters of each, embeddings included; with `by: flops` sizes are solved too where this is given."""
    flops: float | None = Field(default=None, gt=0)
    """by: flops: of a whole run, three forward passes per token; null: those of the first architecture over
    `training.steps`."""

    @model_validator(mode="after")
    def _fits(self) -> MatchSection:
        if self.by == "parameters" and self.parameters is None:
            raise ValueError("parameters: by: parameters needs their number")
        if self.by == "tokens" and self.parameters is not None:
            raise ValueError("parameters: has no effect with by: tokens; set by: parameters")
        if self.by != "flops" and self.flops is not None:
            raise ValueError(f"flops: has no effect with by: {self.by}")
        return self


class SweepSection(Section):
    """The same short runs for every architecture, to find the learning rate of its long ones."""

    lrs: Annotated[list[Rate], Field(min_length=1)]
    """Peak learning rates; the one with the lowest validation loss is taken."""
    steps: Whole | None = None
    """Of a short run; null: a quarter of `training.steps`."""


class MeasureSection(Section):
    """What is measured of a trained model; [] or 0 leaves a part out."""

    validation_tokens: Whole = 65536
    """Held-out tokens read for the final loss, in rows of the training length; all of them where there are fewer."""
    length_multiples: list[Whole] = Field(default=[1, 2, 4, 8])
    """Loss in rows of so many times the training length, of the same held-out text; each divides the largest."""
    length_tokens: Whole = 32768
    """Held-out tokens read at each of these lengths, rounded up to rows of the longest."""
    cache_lengths: list[Whole] = Field(default=[1024, 8192, 65536])
    """Tokens of context for which the bytes of cache and state are counted."""
    tasks: list[Literal["recall", "needle_code", "copy"]] = Field(default=["recall", "needle_code", "copy"])
    """Recall tasks of `fusiontree eval`; recall is MQAR in words of the tokenizer."""
    questions: Whole = 64
    """Asked in each task, at least."""
    recall_pairs: list[Whole] = Field(default=[4, 16], min_length=1)
    """Pairs of a key and a value in a row of recall."""
    copy_sizes: list[Whole] = Field(default=[5, 10], min_length=1)
    """Letters to be copied."""
    step_repeats: int = Field(default=5, ge=0)
    """Timed training steps per architecture, which take turns."""
    speed_repeats: int = Field(default=3, ge=0)
    """Timed generations per architecture, which take turns."""
    prompt_length: Whole = 512
    """Tokens of the prompt of a timed generation."""
    new_tokens: int = Field(default=32, ge=2)
    """Tokens of a timed generation."""

    @model_validator(mode="after")
    def _fits(self) -> MeasureSection:
        longest = max(self.length_multiples, default=1)
        if uneven := [multiple for multiple in self.length_multiples if longest % multiple]:
            raise ValueError(f"length_multiples: {uneven[0]} does not divide the largest, {longest}")
        return self


class MachineSection(Section):
    """Where the runs are computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Whole | None = None
    """CPU threads; null: torch's own choice."""


class GridConfig(Section):
    """What both kinds of grid have."""

    match: MatchSection = MatchSection()
    model: Settings = Field(default_factory=dict)
    """HybridConfig's arguments for all architectures."""
    training: TrainingSection
    """Of every long run; `lr` only where there is no sweep."""
    data: DataSection
    """One text and one tokenizer for all."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    """Every architecture is trained once with each."""
    sweep: SweepSection | None = None
    """Null: all are trained with `training.lr`."""
    measure: MeasureSection = MeasureSection()
    system: MachineSection = MachineSection()

    @model_validator(mode="after")
    def _same_terms(self) -> GridConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} has one twice")
        if self.sweep is not None and "lr" in self.training.model_fields_set:
            raise ValueError("training.lr: has no effect beside sweep.lrs; leave one of them out")
        if self.training.curriculum is not None:
            raise ValueError("training.curriculum: a grid trains at one length")
        if not self.data.validation and self.data.validation_fraction == 0:
            raise ValueError("data.validation: nothing is held out to compare on; name sources or a fraction")
        if not self.data.packing:
            raise ValueError("data.packing: must be true, every row of a grid has the same number of tokens")
        return self

    def named(self) -> dict[str, ArchitectureSection]:
        """The architectures by name, each with its preset."""
        raise NotImplementedError


class CompareConfig(GridConfig):
    """Named architectures side by side."""

    architectures: Annotated[dict[str, ArchitectureSection | None], Field(min_length=1)]
    """Name -> preset and changes; nothing after the name: the preset of that name."""

    def named(self) -> dict[str, ArchitectureSection]:
        return {name: _with_preset(name, section) for name, section in self.architectures.items()}


BASE = "base"


class AblateConfig(GridConfig):
    """One architecture, and the same with one component changed at a time."""

    base: ArchitectureSection
    """What the changes are made in; its preset must be named."""
    changes: Annotated[dict[str, Settings | None], Field(min_length=1)]
    """Name -> HybridConfig's arguments that differ; nothing after the name: the change known by that name."""

    def named(self) -> dict[str, ArchitectureSection]:
        if self.base.preset is None:
            raise ConfigError("base.preset: is required")
        found = {BASE: self.base}
        for name, settings in self.changes.items():
            if name == BASE:
                raise ConfigError(f"changes.{BASE}: is the name of what is changed; give another")
            change = named_change(name) if settings is None else settings
            found[name] = ArchitectureSection(preset=self.base.preset, model={**self.base.model, **change})
        return found


def _with_preset(name: str, section: ArchitectureSection | None) -> ArchitectureSection:
    given = section or ArchitectureSection()
    return given if given.preset is not None else given.model_copy(update={"preset": name})


Grid = TypeVar("Grid", bound=GridConfig)


def parse_grid(kind: type[Grid], content: Mapping[str, Any], where: str) -> Grid:
    """Mapping -> grid; ConfigError names what is wrong."""
    grid = parse_settings(kind, content, where)
    for name in grid.named():
        if not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or name.startswith("."):
            raise ConfigError(f"{where}: {name!r}: a name is letters, digits, _, - and . (it becomes a folder)")
    return grid
