"""Plans that others wrote: every malformed or foreign one is refused with one line, before anything is written."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.deploy.files import path_inside
from fusiontree.deploy.fingerprint import model_fingerprint
from fusiontree.deploy.plan import MAX_PLAN_BYTES, PrunePlan, load_plan, parse_plan, removals, save_plan
from fusiontree.errors import PlanError

LAYERS = [{"mixers": ["mamba", "attention"]}, {"mixers": ["mamba", "attention"]}, {"mixers": ["attention"]}]


class Weights(torch.nn.Module):
    """The three things a plan asks a model for: config.layers, config.hidden_size and named parameters."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(layers=copy.deepcopy(LAYERS), hidden_size=4)
        self.weight = torch.nn.Parameter(torch.randn(700, generator=torch.Generator().manual_seed(seed)))


def good() -> dict[str, Any]:
    return {
        "format": "fusiontree-prune-plan",
        "version": 1,
        "model": {"fingerprint": model_fingerprint(Weights()), "num_hidden_layers": 3, "hidden_size": 4},
        "budget": {"max_loss_increase": 0.05},
        "baseline_loss": 4.0,
        "predicted_loss": 4.01,
        "layers": [
            {"layer": 0, "keep": "mamba", "why": "measured", "gate_mean": 0.9, "bytes_saved": 10,
             "loss_increase": {"mamba": 0.4, "attention": 0.01}, "flops_saved_per_token": 20},
            {"layer": 1, "keep": "both"},
        ],
    }  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    data: Any = good()
    place = data
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        place = place[part]
    if isinstance(place, list) and last == len(place):
        place.append(value)
    else:
        place[last] = value
    return data


def test_a_good_plan_survives_the_file_and_names_what_to_remove(tmp_path: Path) -> None:
    plan = parse_plan(good())
    path = save_plan(plan, tmp_path / "deep" / "plan.json")
    assert load_plan(path) == plan
    assert removals(plan, Weights()) == {0: "attention"}
    assert json.loads(path.read_text())["layers"][0]["keep"] == "mamba"
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_an_edited_plan_is_taken_and_a_layer_left_out_keeps_what_it_has(tmp_path: Path) -> None:
    data = good()
    data["layers"] = [{"layer": 1, "keep": "attention"}]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    assert removals(load_plan(path), Weights()) == {1: "mamba"}


def test_a_plan_without_fingerprint_fits_any_model_of_its_sizes() -> None:
    assert removals(parse_plan(changed("model.fingerprint", None)), Weights(seed=5)) == {0: "attention"}


def test_keeping_the_only_branch_removes_nothing() -> None:
    plan = parse_plan(changed("layers.2", {"layer": 2, "keep": "attention"}))
    assert removals(plan, Weights()) == {0: "attention"}


REFUSED = [
    ("layers.0.layer", 3, "layer 3 does not exist"),
    ("layers.0.layer", -1, "layers.0.layer"),
    ("layers.0.layer", 10**9, "layers.0.layer"),
    ("layers.0.layer", "0", "layers.0.layer"),
    ("layers.0.layer", True, "layers.0.layer"),
    ("layers.0.layer", 1, "layer 1 is listed twice"),
    ("layers.0.keep", "none", "layers.0.keep"),
    ("layers.0.keep", ["mamba", "attention"], "layers.0.keep"),
    ("layers.0.keep", None, "layers.0.keep"),
    ("layers.0.gate_mean", float("nan"), "layers.0.gate_mean"),
    ("layers.0.gate_mean", 1.5, "layers.0.gate_mean"),
    ("layers.0.loss_increase", {"mlp": 0.1}, "layers.0.loss_increase"),
    ("layers.0.loss_increase", {"mamba": float("inf")}, "layers.0.loss_increase"),
    ("layers.0.bytes_saved", -1, "layers.0.bytes_saved"),
    ("layers.0.bytes_saved", 10**30, "layers.0.bytes_saved"),
    ("layers.0.why", "x" * 3000, "layers.0.why"),
    ("layers.0.why", "\ud83d", "layers.0.why"),
    ("layers.0.output", "../../etc/passwd", "layers.0.output"),
    ("output", "/etc/passwd", "output"),
    ("layers", {}, "layers"),
    ("layers", None, "layers"),
    ("layers", [[]], "layers.0"),
    ("layers", [{"layer": 0, "keep": "both"}] * 5000, "layers"),
    ("model", {}, "model.fingerprint"),
    ("model.num_hidden_layers", 10**9, "model.num_hidden_layers"),
    ("model.num_hidden_layers", 0, "model.num_hidden_layers"),
    ("model.hidden_size", 4.0, "model.hidden_size"),
    ("budget.max_loss_increase", -0.1, "budget.max_loss_increase"),
    ("budget.max_loss_increase", float("nan"), "budget.max_loss_increase"),
    ("baseline_loss", "4", "baseline_loss"),
    ("predicted_loss", float("-inf"), "predicted_loss"),
    ("format", "other", "format"),
    ("version", 2, "version"),
]


@pytest.mark.fault(row=28)
@pytest.mark.parametrize(("path", "value", "said"), REFUSED, ids=[f"{p}={str(v)[:20]}" for p, v, _ in REFUSED])
def test_a_wrong_field_is_named_in_one_line(path: str, value: Any, said: str) -> None:
    with pytest.raises(PlanError) as refusal:
        parse_plan(changed(path, value), "plan.json")
    message = str(refusal.value)
    assert message.startswith("plan.json: ")
    assert said in message
    assert "\n" not in message
    assert len(message) < 500


FILES = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"layers": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"gate": NaN}', "NaN"),
    (b'{"gate": 1e999}', "too large"),
    (b'{"layers": [], "layers": []}', "given twice"),
    (b"[1, 2]", "valid dictionary"),
    (b"null", "valid dictionary"),
    (b" " * (MAX_PLAN_BYTES + 1), "too many"),
]


@pytest.mark.fault(row=28)
@pytest.mark.parametrize(("content", "said"), FILES, ids=[c[:12].decode("latin1") for c, _ in FILES])
def test_a_file_that_is_not_a_plan_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=said) as refusal:
        load_plan(path)
    assert "\n" not in str(refusal.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(PlanError, match="no such file"):
            load_plan(path)


FOREIGN = [
    (changed("model.fingerprint", "sha256:00"), "another model: fingerprint"),
    (changed("model.num_hidden_layers", 4), "made for 4 layers"),
    (changed("model.hidden_size", 8), "hidden size 8"),
    (changed("layers.0", {"layer": 2, "keep": "mamba"}), "cannot keep 'mamba'"),
]


@pytest.mark.fault(row=28)
@pytest.mark.parametrize(("data", "said"), FOREIGN, ids=[said for _, said in FOREIGN])
def test_a_plan_for_another_model_is_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        removals(parse_plan(data), Weights())


def test_the_fingerprint_sees_weights_and_layers_but_not_the_dtype() -> None:
    model = Weights()
    assert model_fingerprint(model) == model_fingerprint(Weights().to(torch.bfloat16))
    assert model_fingerprint(model) != model_fingerprint(Weights(seed=1))
    model.config.layers[0]["mixers"] = ["mamba"]
    assert model_fingerprint(model) != model_fingerprint(Weights())


@pytest.mark.fault(row=28)
@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b"])
def test_names_stay_inside_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match="plain name"):
        path_inside(tmp_path, name, PlanError)


@pytest.mark.fault(row=28)
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(PlanError, match="symbolic link"):
        path_inside(tmp_path, "link", PlanError)
    assert path_inside(tmp_path, "file", PlanError) == tmp_path / "file"


def test_saving_replaces_a_link_and_leaves_its_target_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in ("plan.json", ".plan.json.tmp"):
        (tmp_path / name).symlink_to(outside)
    save_plan(parse_plan(good()), tmp_path / "plan.json")
    assert outside.read_text() == "mine"
    assert not (tmp_path / "plan.json").is_symlink()


def test_a_full_disk_keeps_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_plan(parse_plan(good()), tmp_path / "plan.json")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusiontree.deploy.files.os.fsync", full)
    with pytest.raises(PlanError, match="No space left"):
        save_plan(parse_plan(changed("baseline_loss", 9.0)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["mamba", "attention", "both", "../x", "fusiontree-prune-plan"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["layer", "keep", "why", "model", "layers", "mamba", "x"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
PLACES = st.sampled_from(["layers", "layers.0", "layers.0.layer", "layers.0.keep", "layers.1.loss_increase", "model",
                          "model.fingerprint", "budget", "baseline_loss", "layers.2", "version", "new"])  # fmt: skip


@pytest.mark.fault(row=28)
@settings(max_examples=300, deadline=None)
@given(place=PLACES, value=VALUES)
def test_fuzzed_plans_are_either_right_or_refused(place: str, value: Any) -> None:
    try:
        plan = parse_plan(changed(place, value))
        removed = removals(plan, Weights())
    except PlanError as refusal:
        assert "\n" not in str(refusal)
        return
    assert isinstance(plan, PrunePlan)
    assert all(len(LAYERS[layer]["mixers"]) == 2 for layer in removed)
    json.dumps(plan.model_dump(), allow_nan=False).encode()
