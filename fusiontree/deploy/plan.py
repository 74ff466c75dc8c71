"""The prune plan: a JSON file a person can read and edit, saying per layer which branches stay and why."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from fusiontree.deploy.files import write_json
from fusiontree.deploy.fingerprint import model_fingerprint
from fusiontree.errors import PlanError
from fusiontree.models.json_files import one_line, read_json
from fusiontree.models.loading import MAX_LAYERS

MAX_PLAN_BYTES = 8 * 1024 * 1024
MAX_COUNT = 2**53  # the largest integer every JSON reader keeps exactly

Branch = Literal["mamba", "attention"]
BRANCHES: tuple[Branch, ...] = get_args(Branch)

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Text = Annotated[str, StringConstraints(max_length=2000)]


def other_branch(branch: str) -> Branch:
    """The branch that is not `branch`."""
    return "attention" if branch == "mamba" else "mamba"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelIdentity(_Strict):
    """Which model a plan is for; a fingerprint of null (a plan written by hand) fits any model of these sizes."""

    fingerprint: Annotated[str, StringConstraints(max_length=200)] | None
    num_hidden_layers: int = Field(ge=1, le=MAX_LAYERS)
    hidden_size: int = Field(ge=1, le=1 << 24)


class Budget(_Strict):
    """How much the measured loss may rise in all (nats per token); null when the plan comes from gates alone."""

    max_loss_increase: float | None = Field(default=None, ge=0)


class LayerPlan(_Strict):
    """The decision for one layer. Only `keep` decides; the other fields tell why."""

    layer: int = Field(ge=0, lt=MAX_LAYERS)
    keep: Literal["both", "mamba", "attention"]
    why: Text = ""
    gate_mean: float | None = Field(default=None, ge=0, le=1)
    loss_increase: dict[Branch, float] = Field(default_factory=dict)
    bytes_saved: Count = 0
    flops_saved_per_token: Count = 0


class PrunePlan(_Strict):
    """Which branches stay. A layer that is not listed keeps what it has."""

    format: Literal["fusiontree-prune-plan"] = "fusiontree-prune-plan"
    version: Literal[1] = 1
    model: ModelIdentity
    budget: Budget = Field(default_factory=Budget)
    baseline_loss: float | None = None
    predicted_loss: float | None = None
    layers: list[LayerPlan] = Field(max_length=MAX_LAYERS)

    @model_validator(mode="after")
    def _layers_exist_once(self) -> "PrunePlan":
        seen: set[int] = set()
        for entry in self.layers:
            if entry.layer >= self.model.num_hidden_layers:
                last = self.model.num_hidden_layers - 1
                raise ValueError(f"layer {entry.layer} does not exist; the model has layers 0 to {last}")
            if entry.layer in seen:
                raise ValueError(f"layer {entry.layer} is listed twice")
            seen.add(entry.layer)
        return self


def identity_of(model: Any) -> ModelIdentity:
    """The identity a plan made for `model` carries."""
    config = model.config
    return ModelIdentity(
        fingerprint=model_fingerprint(model), num_hidden_layers=len(config.layers), hidden_size=config.hidden_size
    )


def parse_plan(data: Any, where: str = "plan") -> PrunePlan:
    """A checked plan from decoded JSON; PlanError names the first field that is wrong."""
    try:
        return PrunePlan.model_validate(data)
    except ValidationError as problem:
        raise PlanError(f"{where}: {_first_problem(problem)}") from None


def _first_problem(problem: ValidationError) -> str:
    first = problem.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not place:
        return one_line(message)
    given = "" if first["type"] == "missing" else f" (given: {one_line(repr(first['input']), 60)})"
    return f"{place}: {one_line(message)}{given}"


def load_plan(path: str | Path) -> PrunePlan:
    """Read and check a plan file; PlanError with one line says what is wrong and where."""
    path = Path(path)
    return parse_plan(read_json(path, MAX_PLAN_BYTES, PlanError), str(path))


def save_plan(plan: PrunePlan, path: str | Path) -> Path:
    """Write the plan atomically as indented JSON."""
    path = Path(path)
    write_json(path, parse_plan(plan.model_dump()).model_dump(), PlanError)
    return path


def removals(plan: PrunePlan, model: Any) -> dict[int, Branch]:
    """Layer → branch to take out of `model`; PlanError when the plan is for another model or removes a last branch."""
    _check_identity(plan.model, model)
    removed: dict[int, Branch] = {}
    for entry in plan.layers:
        mixers = list(model.config.layers[entry.layer]["mixers"])
        if entry.keep == "both":
            continue
        if entry.keep not in mixers:
            raise PlanError(f"layer {entry.layer}: cannot keep {entry.keep!r}; it has only {', '.join(mixers)}")
        if len(mixers) > 1:
            removed[entry.layer] = other_branch(entry.keep)
    return removed


def _check_identity(planned: ModelIdentity, model: Any) -> None:
    layers, hidden_size = len(model.config.layers), model.config.hidden_size
    if (planned.num_hidden_layers, planned.hidden_size) != (layers, hidden_size):
        raise PlanError(
            f"a plan for another model: made for {planned.num_hidden_layers} layers of hidden size "
            f"{planned.hidden_size}, this model has {layers} layers of hidden size {hidden_size}"
        )
    if planned.fingerprint is not None and planned.fingerprint != (actual := model_fingerprint(model)):
        given = one_line(planned.fingerprint, 50)
        raise PlanError(f"a plan for another model: fingerprint {given}, this model has {actual}")
