"""Loss spikes: a step whose loss stands far above the usual one is told with the text that was in it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fusiontree.train.callbacks import Callback, Snapshot
from fusiontree.train.config import TrainingSection
from fusiontree.train.jsonl import JsonLines

WINDOW = 64  # steps that say what is usual
LEAST = 8  # steps before which nothing is
SPREADS = 6.0  # median absolute deviations, scaled to standard deviations: rows of few tokens are noisy anyway
TO_SIGMA = 1.4826  # of a normal distribution
NAMED = 6  # documents named in the line; spikes.jsonl has all


@dataclass(frozen=True)
class Spike:
    """A step that stands out, beside what was usual before it."""

    step: int
    loss: float
    usual_loss: float
    grad_norm: float
    usual_grad_norm: float

    @property
    def size(self) -> float:
        """How many times the usual loss."""
        return self.loss / self.usual_loss if self.usual_loss > 0 else math.inf


class SpikeGuard(Callback):
    """Looks at every step's loss, the same in all processes; medians, which the spikes themselves do not move.

    `file` gets a line for each spike. A loss that is not finite is not looked at: the engine leaves such a step out.
    """

    name = "spikes"

    def __init__(self, settings: TrainingSection, file: JsonLines) -> None:
        self.settings, self.file = settings, file
        self.count = 0
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def on_start(self, run: Snapshot) -> None:
        """Spikes after the checkpoint will come again."""
        if self.file.writes:
            self.file.trim(run.step)

    def see(self, step: int, loss: float, grad_norm: float) -> Spike | None:
        """Take in a step; the spike that it is, if it is one."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return None
        spike = None
        if len(self.losses) >= LEAST and self._stands_out(loss):
            spike = Spike(step, loss, median(self.losses), grad_norm, median(self.norms))
            self.count += 1
        self.losses.append(loss)
        self.norms.append(grad_norm)
        return spike

    def _stands_out(self, loss: float) -> bool:
        usual = median(self.losses)
        if loss <= self.settings.spike_factor * usual:
            return False
        spread = TO_SIGMA * median(abs(other - usual) for other in self.losses)
        return loss > usual + SPREADS * spread

    def ends_the_run(self, spike: Spike) -> bool:
        """Whether the settings stop at a spike of this size."""
        return self.settings.spike_stop is not None and spike.size >= self.settings.spike_stop

    def tell(self, spike: Spike, samples: Sequence[int], origins: Callable[[int], list[str]]) -> str:
        """One line for a person; the whole list of samples and of documents in them goes into the file."""
        documents = list(dict.fromkeys(place for sample in samples for place in origins(sample)))
        self.file.write(
            {
                "step": spike.step,
                "loss": spike.loss,
                "usual_loss": spike.usual_loss,
                "grad_norm": spike.grad_norm,
                "usual_grad_norm": spike.usual_grad_norm,
                "samples": list(samples),
                "documents": documents,
            }
        )
        more = f" and {len(documents) - NAMED} more in {self.file.path}" if len(documents) > NAMED else ""
        return (
            f"loss spike at step {spike.step}: {spike.loss:.4f}, {spike.size:.1f} times the usual "
            f"{spike.usual_loss:.4f} (gradient norm {spike.grad_norm:.3g}, usually {spike.usual_grad_norm:.3g}); "
            f"samples {samples[0]} to {samples[-1]}: {', '.join(documents[:NAMED])}{more}; look at that text, and if "
            "spikes come without a reason in it, lower training.lr or training.max_grad_norm"
        )

    def state_dict(self) -> dict[str, Any]:
        """What is usual, and how many spikes there were."""
        return {"count": self.count, "losses": list(self.losses), "norms": list(self.norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.count = int(state["count"])
        self.losses, self.norms = deque(state["losses"], WINDOW), deque(state["norms"], WINDOW)
