"""Errors a user can cause; the command line prints their one line and exits with 2."""


class FusionTreeError(Exception):
    """Base of every error that is about the input, not about a bug: one line saying what, where and what is allowed."""


class ConfigError(FusionTreeError):
    """A setting is unknown, of the wrong type, or impossible together with another."""


class DataError(FusionTreeError):
    """Text, tokenizer or data position cannot be used."""


class CheckpointError(FusionTreeError):
    """A model folder or training checkpoint is missing, damaged, foreign or cannot be written."""


class PlanError(FusionTreeError):
    """A prune plan is malformed or does not fit the model."""


class TrainingError(FusionTreeError):
    """Training cannot go on (for example a loss that is not finite)."""


class LostRankError(TrainingError):
    """Another process of the run is gone; `told`: a process of a lower rank says so already."""

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told
