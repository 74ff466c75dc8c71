"""How much memory a run will take, per process, before anything is built.

Three moments of a step decide: the loss, when everything that the backward needs stands in memory; the backward, layer
by layer, as kept tensors go and gradients come; the update. What stands between them is the engine's affair.
P parameters, N processes, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fusiontree.data import Stage
from fusiontree.models import HybridConfig, account
from fusiontree.models.accounting import has_gate
from fusiontree.models.activations import LayerActivations, Pass, layer_activations, shared_activations
from fusiontree.ops.linear_cross_entropy import tokens_at_once
from fusiontree.train.config import RunConfig
from fusiontree.train.holdings import Holdings, holdings

_F32 = 4
# Gradients on their way through a layer, in fp32 tensors of H per token: measured, see the test.
_IN_FLIGHT = {"none": 4, "branches": 8, "block": 4}
_SCORED_AT_ONCE = 2048  # tokens, in eval.perplexity


@dataclass(frozen=True)
class Forecast:
    """What one process holds at the run's worst moment."""

    processes: int
    device: str
    stage: Stage
    """The stage of the curriculum that needs most."""
    checkpointing: str
    moment: str
    """loss, backward, update or validation."""
    parts: dict[str, int]
    """weights, gradients, optimizer, activations, transient → bytes on the device."""
    host: dict[str, int]
    """What is kept in the host's memory instead, per process."""

    @property
    def total(self) -> int:
        """Bytes on the device: what torch allocates at most. The driver's own and fragmentation come on top."""
        return sum(self.parts.values())

    @property
    def on_top(self) -> int:
        """Bytes that training adds to a process in which the model's weights stand already."""
        return self.total - self.parts["weights"]


def forecast(
    config: RunConfig,
    model: HybridConfig,
    processes: int = 1,
    device: str = "cuda",
    teacher: HybridConfig | None = None,
) -> Forecast:
    """The worst moment of the run. Raises ConfigError when the processes cannot divide a step."""
    return max(by_stage(config, model, processes, device, teacher), key=lambda one: one.total)


def by_stage(
    config: RunConfig, model: HybridConfig, processes: int, device: str, teacher: HybridConfig | None = None
) -> list[Forecast]:
    """The worst moment of each stage of the curriculum."""
    held = holdings(config, model, processes, device)
    found = []
    for stage in config.training.stages(processes):
        mode = checkpointing_at(config, stage)
        moments = _moments(_Step(config, model, stage, mode, device, held, teacher))
        worst = max(moments, key=lambda moment: moments[moment].total())
        found.append(Forecast(processes, device, stage, mode, worst, dict(moments[worst]), held.host))
    return found


def checkpointing_at(config: RunConfig, stage: Stage) -> str:
    """What the run computes again in the backward of this stage."""
    return "block" if stage.needs_memory else config.training.activation_checkpointing


@dataclass(frozen=True)
class _Step:
    """One micro-batch of one stage, as one process sees it."""

    config: RunConfig
    model: HybridConfig
    stage: Stage
    checkpointing: str
    device: str
    held: Holdings
    teacher: HybridConfig | None

    @property
    def run(self) -> Pass:
        value = _F32 if self.config.training.precision == "fp32" else 2
        return Pass(self.stage.micro_batch_size, self.stage.length, value, self.config.data.packing, self.device)

    @property
    def layers(self) -> list[LayerActivations]:
        specs = self.model.layer_specs
        kinds = {spec: layer_activations(self.model, spec, self.run) for spec in set(specs)}
        return [kinds[spec] for spec in specs]

    @property
    def vocabulary(self) -> int:
        """Weights of the embedding, or of the output head."""
        return self.model.vocab_size * self.model.hidden_size


Parts = Counter[str]


def _moments(step: _Step) -> dict[str, Parts]:
    return {
        "loss": _at_loss(step),
        "backward": _in_backward(step),
        "update": _at_update(step),
        "validation": _at_validation(step),
    }


def _standing(step: _Step) -> Parts:
    """What is there before a micro-batch: weights, optimizer state, and gradients of earlier micro-batches."""
    held = step.held
    parts = Counter(weights=held.weights, gradients=held.standing, optimizer=held.optimizer)
    if step.stage.accumulation_steps > 1:
        parts["gradients"] = max(held.accumulated, held.standing)
    if step.teacher is not None:
        parts["weights"] += _F32 * account(step.teacher).total_parameters // held.divided_by
    return parts


def _kept(step: _Step) -> int:
    """All that waits for the backward."""
    kept = sum(layer.kept(step.checkpointing, watched=True) for layer in step.layers)
    return kept + sum(_shared(step).values())


def _shared(step: _Step) -> dict[str, int]:
    parts = shared_activations(step.model, step.run, recomputes=step.checkpointing != "none")
    if step.teacher is not None:
        parts["loss"] = step.run.tokens * step.model.vocab_size * (3 * _F32 + 2 * step.run.value_bytes)
    weights = step.config.training.loss
    if weights.entropy_weight or weights.sharpen_weight:
        # Of p log p + (1-p) log(1-p), fp32: the gate, p, 1-p, both logarithms and -p.
        parts["gate loss"] = 6 * _F32 * step.run.tokens * step.model.hidden_size * _gates(step.model)
    return parts


def _gates(model: HybridConfig) -> int:
    """Layers that have a gate between two branches."""
    return sum(has_gate(model, spec) for spec in model.layer_specs)


def _at_loss(step: _Step) -> Parts:
    parts, run = _standing(step), step.run
    parts["activations"] = _kept(step)
    hidden = _F32 * run.tokens * step.model.hidden_size
    gates = 6 * hidden if _gates(step.model) else 0
    # The head is through before the gates' own terms keep anything.
    passing = max(_head(step) + hidden - _shared(step).get("gate loss", 0), gates)
    parts["transient"] = passing + _cached_casts(step) + step.held.gathered
    return parts


def _head(step: _Step) -> int:
    """Logits of some tokens, their softmax and gradient; the head's weights and gradient in the compute's precision."""
    run, size, value = step.run, step.model.vocab_size, step.run.value_bytes
    if step.teacher is not None:
        return 3 * _F32 * run.tokens * size
    tokens = min(run.tokens, tokens_at_once(size))
    # A CPU turns the logits into fp32 before the softmax; a GPU does both at once.
    softmax = _F32 if run.device == "cuda" or value == _F32 else 2 * _F32
    before = value if tokens < run.tokens else 0  # the chunk before leaves its gradient until the next is there
    chunk = tokens * size * (value + softmax + before)
    product = step.vocabulary * value + tokens * size * value
    casts = 0 if value == _F32 else (value + _F32) * step.vocabulary + value * run.tokens * step.model.hidden_size
    return max(chunk, product) + casts - (0 if value == _F32 else value * step.vocabulary)


def _cached_casts(step: _Step) -> int:
    """Autocast remembers every weight it has turned into the compute's precision until the forward is over."""
    return sum(layer.forgotten_casts(step.checkpointing) for layer in step.layers)


def _in_backward(step: _Step) -> Parts:
    """The worst of the layers, from the last to the first."""
    standing, shared, layers = _standing(step), sum(_shared(step).values()), step.layers
    sizes = [_F32 * sum(layer.parameters.values()) for layer in account(step.model).per_layer]
    hidden = _F32 * step.run.tokens * step.model.hidden_size
    gate_gradients = step.run.value_bytes * step.run.tokens * step.model.hidden_size
    worst = Parts()
    for i, layer in enumerate(layers):
        kept = [below.kept(step.checkpointing, watched=True) for below in layers[: i + 1]]
        gated = sum(has_gate(step.model, spec) for spec in step.model.layer_specs[:i])
        parts = standing.copy()
        parts["activations"] = shared + sum(kept)
        parts["transient"] = layer.brought_back(step.checkpointing) + _IN_FLIGHT[step.checkpointing] * hidden
        parts["transient"] += gated * gate_gradients + step.held.exchange
        parts["transient"] += step.held.gathered + _F32 * step.vocabulary  # the head's gradient comes first
        parts["gradients"] = parts["gradients"] or round(sum(sizes[i + 1 :]) * step.held.kept_part)
        worst = max(worst, parts, key=Parts.total)
    return worst


def _at_update(step: _Step) -> Parts:
    """After the embedding's gradient, which is as large as the table, has joined the head's."""
    parts = _standing(step)
    standing = bool(parts["gradients"])
    parts["gradients"] = step.held.gradients
    embedding = _F32 * step.vocabulary * (2 if standing and step.model.tie_word_embeddings else 1)
    parts["transient"] = max(embedding, step.held.update)
    return parts


def _at_validation(step: _Step) -> Parts:
    """As `eval.perplexity` measures it: the logits of a batch, those of them that count, and the softmax of some."""
    settings, value = step.config.training, step.run.value_bytes
    tokens = settings.micro_batch_size * settings.sequence_length
    parts = _standing(step)
    parts["gradients"] = step.held.standing
    softmax = min(tokens, _SCORED_AT_ONCE) * (_F32 if value == _F32 else 2 * _F32)
    parts["transient"] = (2 * value * tokens + softmax) * step.model.vocab_size + step.held.gathered
    return parts
