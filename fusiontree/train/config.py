"""RunConfig: every setting of a training run, strictly typed; `load_config` reads YAML plus `key=value` overrides."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from fusiontree.data import DataConfig, Preset, Stage, StrictModel, TokenizerConfig, plan_stages
from fusiontree.errors import ConfigError
from fusiontree.models import HybridConfig
from fusiontree.train.yaml_files import parse_value, read_yaml


class Section(StrictModel):
    """A section of the run's settings: strict like all, and every number finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class LossSection(Section):
    """Weights of the composite loss and the two phases of the gates."""

    balance_weight: float = Field(default=0.01, ge=0)
    """Weight of the load-balance hinge while the run is in its balance phase."""
    balance_target: float = Field(default=0.5, ge=0, le=1)
    """Mean gate that the hinge asks of every layer (1 = all Mamba, 0 = all attention)."""
    balance_margin: float = Field(default=0.1, ge=0, le=1)
    """Distance from the target that costs nothing."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Balance phase: weight that keeps single gates undecided."""
    sharpen_weight: float = Field(default=0.0, ge=0)
    """Specialise phase: weight that drives single gates to an end."""
    specialise_after: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the steps after which the balance phase ends; 1 = never."""
    router_weight: float = Field(default=0.01, ge=0)
    """Weight of the loss that spreads tokens evenly over the experts of a model that has them."""
    distill_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the teacher; used when a teacher is handed in."""
    distill_temperature: float = Field(default=2.0, gt=0)
    """Softens both distributions; the term is multiplied by its square."""


LengthAndSteps = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]


class TrainingSection(Section):
    """Steps, sizes, optimizer, schedule, precision, saving and validation."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    sequence_length: int = Field(ge=2)
    """Tokens per row."""
    micro_batch_size: int = Field(ge=1)
    """Rows per forward pass of one process, at most."""
    accumulation_steps: int = Field(default=1, ge=1)
    """micro_batch_size × accumulation_steps rows make an optimizer step. Several processes divide them among
    themselves, so the run is the same on any number; the loss is averaged by real tokens over all of them."""
    curriculum: Preset | Annotated[list[LengthAndSteps], Field(min_length=1)] | None = None
    """Lengths of rows over the run: standard, aggressive or conservative (4K to 64K), or a list of [length, steps], the
    last length staying to the end. A step keeps its tokens; rows that are longer than a micro-batch has tokens are
    computed again in the backward pass. Validation stays at `sequence_length`. Null: that length throughout."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, everything else by AdamW, one learning rate for both."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Last learning rate / peak."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise to the peak."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Way down from the peak; wsd: stay, then fall linearly over the last `decay_fraction` of the steps."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """wsd only."""
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices only, never on state-space parameters, norms, biases or embeddings."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW epsilon."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global L2 norm."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """bf16, fp16: autocast over fp32 weights; fp16 with a loss scale that follows the gradients."""
    compile: bool = False
    """torch.compile each block."""
    teacher: str | None = None
    """Folder of a FusionTree model with the same tokenizer, to learn from as `loss.distill_weight` says."""
    activation_checkpointing: Literal["none", "branches", "block"] = "none"
    """What is computed again in the backward pass to save memory."""
    save_every: int | None = Field(default=500, ge=1)
    """Steps between checkpoints; null: only at the end and when interrupted."""
    save_total_limit: int | None = Field(default=2, ge=1)
    """Checkpoints kept, besides the one with the best validation loss; null: all."""
    validation_every: int | None = Field(default=500, ge=1)
    """Steps between validations; null: only before and after."""
    validation_batches: int = Field(default=20, ge=1)
    """Batches of `micro_batch_size` rows per validation, always the same ones."""
    max_skipped_steps: int = Field(default=0, ge=0)
    """Steps in a row whose loss or gradient is not finite that are left out before the run stops."""
    spike_factor: float = Field(default=1.5, gt=1)
    """A step is told as a loss spike when its loss is more than this many times the usual one, the median of the last
    64 steps, and far outside their spread."""
    spike_stop: float | None = Field(default=None, gt=1)
    """The run stops at a spike of at least this many times the usual loss; null: it is told, and the run goes on."""
    loss: LossSection = LossSection()

    @model_validator(mode="after")
    def _fits(self) -> TrainingSection:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than steps {self.steps}")
        self.stages()
        if self.spike_stop is not None and self.spike_stop < self.spike_factor:
            raise ValueError(f"spike_stop {self.spike_stop} is less than spike_factor {self.spike_factor}")
        if self.teacher is not None and self.loss.distill_weight == 0:
            raise ValueError("teacher: needs loss.distill_weight above 0")
        return self

    def stages(self, processes: int = 1) -> list[Stage]:
        """The lengths of the run and how each process cuts a step at each; one stage where there is no curriculum."""
        sizes = (self.sequence_length, self.micro_batch_size, self.accumulation_steps)
        return plan_stages(self.curriculum, self.steps, *sizes, processes)

    @property
    def longest(self) -> int:
        """Tokens of the longest rows of the run."""
        return max(self.sequence_length, *(stage.length for stage in self.stages()))


class DataSection(DataConfig):
    """Sources and packing, plus the tokenizer."""

    tokenizer: TokenizerConfig
    """An existing tokenizer, or the size of the one to train on the run's own text."""


class GateMonitorSection(Section):
    """What is watched of the gates, how often, and when it is worth an alarm."""

    enabled: bool = True
    every: int = Field(default=50, ge=1)
    """Steps between lines in gates.jsonl."""
    sample_every: int = Field(default=4, ge=1)
    """Steps between looks at the gates."""
    sample_tokens: int = Field(default=128, ge=1)
    """Tokens looked at, spread evenly over the batch."""
    decay: float = Field(default=0.5, ge=0, lt=1)
    """Weight that earlier observations keep at every line; 0 forgets them."""
    token_classes: bool = True
    """Also the mean gate on spaces, words, numbers and punctuation."""
    alarm_after: float = Field(default=0.25, ge=0, le=1)
    """Fraction of the steps before which nothing is alarming: gates start at 0.5."""
    stuck_width: float = Field(default=0.02, ge=0, le=0.5)
    """Alarm when |mean - 0.5| and the standard deviation are both below this."""
    collapse_margin: float = Field(default=0.05, ge=0, le=0.5)
    """Alarm when the mean is closer than this to 0 or 1."""
    silent_ratio: float = Field(default=0.02, ge=0, le=1)
    """Alarm when one branch's rms is below this fraction of the other's."""


class ProbesSection(Section):
    """Perplexity by length of context and recall, measured while training without a trace in it."""

    every: int | None = Field(default=None, ge=1)
    """Steps between probes, which are also made before the first step and after the last; null: none."""
    perplexity_lengths: list[Annotated[int, Field(ge=2)]] | None = None
    """Tokens of context, each a divisor of the longest; null: `training.sequence_length` and a quarter of it; []: no
    perplexity. The same held-out text is cut into rows of each length."""
    perplexity_tokens: int = Field(default=8192, ge=1)
    """Held-out tokens read at each length, rounded up to rows of the longest."""
    recall_pairs: list[Annotated[int, Field(ge=1)]] = Field(default=[4, 16])
    """Recall is asked in rows with so many pairs of a key and a value; []: no recall."""
    recall_questions: int = Field(default=128, ge=1)
    """Values asked for with each number of pairs, rounded up to whole rows."""

    def lengths(self, sequence_length: int) -> list[int]:
        """The lengths of context in a run with rows of `sequence_length`, shortest first."""
        if self.perplexity_lengths is not None:
            return sorted(set(self.perplexity_lengths))
        quarter = [sequence_length // 4] if sequence_length % 4 == 0 and sequence_length >= 8 else []
        return [*quarter, sequence_length]


class LoggingSection(Section):
    """Where the figures go; metrics.jsonl is always written."""

    every: int = Field(default=10, ge=1)
    """Steps between lines of metrics."""
    console: Literal["auto", "plain", "off"] = "auto"
    """auto: progress bar on a terminal, plain lines elsewhere."""
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "fusiontree"


class SystemSection(Section):
    """Folder, seed and machine."""

    run_dir: str = Field(default="runs/default", min_length=1)
    """Everything the run writes; started again on the same folder, it goes on."""
    seed: int = Field(default=0, ge=0)
    """Weights, data order and branch dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; null: torch's own choice."""
    engine: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """How processes share the work. single: there is one. ddp: each has the whole model. fsdp: weights, gradients and
    optimizer state are divided. deepspeed: as `deepspeed` says. auto: ddp when torchrun started several, else single.
    """
    deepspeed: str | None = None
    """JSON file with DeepSpeed's `zero_optimization` and what else the run's own settings do not say."""
    offload: bool = False
    """fsdp: weights and optimizer state rest in the host's memory (DeepSpeed's file has its own settings for that)."""
    timeout: float = Field(default=600, gt=0)
    """Seconds after which a process that waits for another gives up."""


class RunConfig(Section):
    """A whole training run. `model` holds HybridConfig's arguments; `vocab_size` may be left out (the tokenizer's)."""

    model: dict[str, Any] = Field(default_factory=dict)
    training: TrainingSection
    data: DataSection
    gate_monitor: GateMonitorSection = GateMonitorSection()
    probes: ProbesSection = ProbesSection()
    logging: LoggingSection = LoggingSection()
    system: SystemSection = SystemSection()

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        check_model_section(self.model)
        limit, longest = self.model.get("max_position_embeddings"), self.training.longest
        if limit is not None and longest > limit:
            name = "curriculum: its length" if longest > self.training.sequence_length else "sequence_length"
            raise ValueError(f"training.{name} {longest} is more than model.max_position_embeddings {limit}")
        _check_engine(self.system)
        if self.training.curriculum is not None and not self.data.packing:
            raise ValueError("training.curriculum: needs data.packing, where every row has the same number of tokens")
        if self.probes.every is not None:
            self._check_probes(limit or max(longest, HybridConfig.max_position_embeddings))
        return self

    def _check_probes(self, limit: int) -> None:
        """Probes fit into the model, and there is text for them."""
        lengths = self.probes.lengths(self.training.sequence_length)
        sizes = {
            "perplexity_lengths": max(lengths, default=0),
            "recall_pairs": 4 * max(self.probes.recall_pairs, default=0),
        }
        for name, tokens in sizes.items():
            if tokens > limit:
                raise ValueError(f"probes.{name}: makes rows of {tokens}; model.max_position_embeddings is {limit}")
        if uneven := [length for length in lengths if lengths[-1] % length]:
            raise ValueError(f"probes.perplexity_lengths: {uneven[0]} does not divide the longest, {lengths[-1]}")
        if lengths and not self.data.validation and self.data.validation_fraction == 0:
            raise ValueError("probes.perplexity_lengths: nothing is held out; name data.validation, or set it to []")


def _check_engine(system: SystemSection) -> None:
    if (system.engine == "deepspeed") != (system.deepspeed is not None):
        raise ValueError("system.deepspeed: names the JSON file of system.engine=deepspeed, and of that engine only")
    if system.offload and system.engine != "fsdp":
        raise ValueError(f"system.offload: needs system.engine=fsdp, not {system.engine}")


# HybridConfig's arguments and their types; what is computed again is said by training.activation_checkpointing alone.
MODEL_ARGUMENTS: dict[str, Any] = {
    name: hint
    for name, hint in inspect.get_annotations(HybridConfig, eval_str=True).items()
    if get_origin(hint) is not ClassVar and name != "checkpointing"
}
_model_fields: dict[str, Any] = {name: (hint, None) for name, hint in MODEL_ARGUMENTS.items()}
_ModelSection: type[BaseModel] = create_model("ModelSection", __base__=Section, **_model_fields)


def check_model_section(section: Mapping[str, Any]) -> None:
    """Raise ConfigError for unknown keys, wrong types, and sizes that HybridConfig refuses."""
    try:
        _ModelSection.model_validate(dict(section))
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(item, "model") for item in error.errors())) from error
    try:
        HybridConfig(**{"vocab_size": 256, **section})
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read YAML and apply `section.key=value` overrides; raises ConfigError naming field, value and what is allowed."""
    return parse_config(read_overridden(path, overrides), where=str(path))


def read_overridden(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML file holds, with `section.key=value` overrides applied."""
    content = read_yaml(Path(path))
    for override in overrides:
        apply_override(content, override)
    return content


def parse_config(content: Mapping[str, Any], where: str = "config") -> RunConfig:
    """Mapping -> RunConfig; raises ConfigError naming every wrong field."""
    return parse_settings(RunConfig, content, where)


Settings = TypeVar("Settings", bound=Section)


def parse_settings(kind: type[Settings], content: Mapping[str, Any], where: str) -> Settings:
    """Mapping -> settings of a `kind`; raises ConfigError naming every wrong field."""
    try:
        return kind.model_validate(dict(content))
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_describe(item, kind=kind) for item in error.errors())) from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in nested mappings and lists; the new section is made when it is missing."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected section.key=value, for example training.lr=1e-3")
    if not text.strip():
        raise ConfigError(f"override {override!r}: a value is missing after =; null says that there is none")
    node: Any = content
    for depth, key in enumerate(keys):
        where: Any = key
        if isinstance(node, list):
            where = _index(node, key, override)
        elif not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[:depth])} is not a section")
        if depth == len(keys) - 1:
            node[where] = parse_value(text, f"override {override!r}")
        else:
            node = node.setdefault(where, {}) if isinstance(node, dict) else node[where]


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"override {override!r}: {key!r} is not an entry of a list of {len(node)}")
    return int(key)


def _describe(item: Any, *prefix: str, kind: type[Section] = RunConfig) -> str:
    """One pydantic error as `field: what is wrong, not the value given`."""
    location = (*prefix, *item["loc"])
    field = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"{field}: unknown key{_hint(str(location[-1]), _keys_beside(location, kind))}"
    if item["type"] == "missing":
        return f"{field}: is required"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{field}: {message}" if field else message
    if item["type"] in ("model_type", "dict_type"):
        given = "is empty" if item["input"] is None else f"is {item['input']!r}"
        return f"{field}: {given}; expected key: value pairs, or leave it out for the defaults"
    return f"{field}: {message[0].lower()}{message[1:]}, not {item['input']!r}"


def _keys_beside(location: Sequence[Any], kind: type[Section]) -> list[str]:
    """The keys allowed where an unknown one was found."""
    if location[0] == "model":
        return list(MODEL_ARGUMENTS)
    model: Any = kind
    for part in location[:-1]:
        if isinstance(part, str) and part in model.model_fields:  # else the name of an entry
            model = _section_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section_in(annotation: Any) -> Any:
    """The section that a field holds: itself, perhaps none, or as entries of a list or a mapping."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _section_in(argument)) is not None), None)


def _hint(key: str, allowed: Sequence[str]) -> str:
    close = get_close_matches(key, allowed, n=1, cutoff=0.8) or get_close_matches(key, allowed, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; allowed: {', '.join(sorted(allowed))}"
