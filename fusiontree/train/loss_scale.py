"""The number fp16 losses are multiplied by, so that small gradients do not vanish."""

from __future__ import annotations

from fusiontree.train.config import TrainingSection

FIRST = 2.0**16
GROWS_AFTER = 2000  # steps in a row without an overflow, as torch.amp.GradScaler


class LossScale:
    """Halved after a step whose gradients overflow, doubled after many that do not; 1 throughout without fp16."""

    def __init__(self, settings: TrainingSection) -> None:
        self.follows = settings.precision == "fp16"
        self.value = FIRST if self.follows else 1.0
        self.good = 0

    def succeeded(self) -> None:
        """After a step that updated the weights."""
        self.good += 1
        if self.follows and self.good % GROWS_AFTER == 0:
            self.value *= 2

    def shrink(self) -> bool:
        """After gradients that are not finite; whether a smaller scale may help (else the loss itself is bad)."""
        self.good = 0
        if not self.follows or self.value <= 1.0:
            return False
        self.value /= 2
        return True

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"value": self.value, "good": self.good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what `state_dict` gave."""
        self.value, self.good = state["value"], int(state["good"])
