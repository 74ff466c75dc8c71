"""Sizes and steps of the architectures of a grid, so that they are equal in what the grid asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusiontree.errors import ConfigError
from fusiontree.lab.grid.config import ArchitectureSection, GridConfig
from fusiontree.models.accounting import account
from fusiontree.models.config import HybridConfig
from fusiontree.models.presets import preset
from fusiontree.models.solve import solve
from fusiontree.train.config import MODEL_ARGUMENTS

TRAINING_COST = 3  # forward passes that a training step costs: one forward, two for the gradients


@dataclass(frozen=True)
class Contender:
    """An architecture with its sizes and its budget."""

    name: str
    preset: str
    model: dict[str, Any]  # the model section of its runs
    parameters: int
    flops_per_token: float  # of a forward pass at the training length
    steps: int
    tokens: int  # of a whole run
    off: float  # relative: how far from what was asked in what they are matched by

    @property
    def training_flops(self) -> float:
        """Of a whole run."""
        return TRAINING_COST * self.flops_per_token * self.tokens

    @property
    def config(self) -> HybridConfig:
        return HybridConfig(**self.model)

    def cost(self, steps: int) -> float:
        """FLOPs of a run of so many steps."""
        return self.training_flops * steps / self.steps


def tokens_per_step(grid: GridConfig) -> int:
    training = grid.training
    return training.sequence_length * training.micro_batch_size * training.accumulation_steps


def contenders(grid: GridConfig, vocabulary: int) -> dict[str, Contender]:
    """The grid's architectures, sized for the tokenizer's vocabulary; ConfigError for sizes that cannot be."""
    configs = {name: _sized(name, section, grid, vocabulary) for name, section in grid.named().items()}
    found: dict[str, Contender] = {}
    budget = grid.match.flops
    for name, config in configs.items():
        counted = account(config, length=grid.training.sequence_length)
        steps, off = grid.training.steps, 0.0
        per_step = TRAINING_COST * counted.flops_per_token * tokens_per_step(grid)
        if grid.match.by == "flops":
            budget = budget or per_step * steps
            steps = max(1, round(budget / per_step))
            off = steps * per_step / budget - 1
        elif grid.match.parameters is not None:
            off = counted.total_parameters / grid.match.parameters - 1
        found[name] = Contender(
            name=name,
            preset=str(grid.named()[name].preset),
            model=model_section(config),
            parameters=counted.total_parameters,
            flops_per_token=counted.flops_per_token,
            steps=steps,
            tokens=steps * tokens_per_step(grid),
            off=off,
        )
    _check_steps(grid, found)
    return found


def _check_steps(grid: GridConfig, found: dict[str, Contender]) -> None:
    """Every run is at least as long as its warm-up."""
    for name, contender in found.items():
        if contender.steps < grid.training.warmup_steps:
            raise ConfigError(
                f"architectures.{name}: {contender.steps} steps come to the FLOPs asked for, fewer than the "
                f"{grid.training.warmup_steps} of training.warmup_steps; raise match.flops"
            )


def _sized(name: str, section: ArchitectureSection, grid: GridConfig, vocabulary: int) -> HybridConfig:
    settings = {**grid.model, **section.model}
    if settings.setdefault("vocab_size", vocabulary) != vocabulary:
        raise ConfigError(
            f"architectures.{name}: vocab_size {settings['vocab_size']}, but the tokenizer that all share has "
            f"{vocabulary} ids; leave it out"
        )
    length = grid.training.sequence_length
    if settings.setdefault("max_position_embeddings", length) < length:
        limit = settings["max_position_embeddings"]
        raise ConfigError(f"architectures.{name}: max_position_embeddings {limit} is less than the {length} trained at")
    try:
        if grid.match.parameters is None:
            return preset(str(section.preset), **settings)
        return solve(str(section.preset), params=grid.match.parameters, length=length, **settings).config
    except ConfigError as error:
        raise ConfigError(f"architectures.{name}: {error}") from error


def model_section(config: HybridConfig) -> dict[str, Any]:
    """What `HybridConfig(**section)` needs to make the same configuration again."""
    return {
        name: value for name in MODEL_ARGUMENTS if (value := getattr(config, name)) != getattr(HybridConfig, name, None)
    }
