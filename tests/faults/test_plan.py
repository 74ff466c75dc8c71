"""Row 28 on the command line: a plan that is no plan for this model is refused, and nothing is written anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusiontree.deploy.plan import MAX_PLAN_BYTES, LayerPlan, PrunePlan, identity_of, save_plan
from tests.deploy.tiny import save_tiny, tiny_model
from tests.faults.process import call

pytestmark = pytest.mark.fault(row=28)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two layers and a good plan for it."""
    folder, model = tmp_path_factory.mktemp("made"), tiny_model()
    save_tiny(folder / "model", model)
    save_plan(PrunePlan(model=identity_of(model), layers=[LayerPlan(layer=0, keep="mamba")]), folder / "plan.json")
    return folder


def edited(made: Path, **changes: Any) -> str:
    return json.dumps({**json.loads((made / "plan.json").read_text(encoding="utf-8")), **changes})


def layer(**entry: Any) -> dict[str, Any]:
    return {"layers": [{"layer": 0, "keep": "mamba", **entry}]}


PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "path upwards": (layer(output="../../out"), "layers.0.output"),
    "absolute path": ({"output": "/etc/fusiontree"}, "output"),
    "path as a layer": (layer(layer="../0"), "layers.0.layer"),
    "NaN ratio": (layer(gate_mean=float("nan")), "NaN is not a number that JSON allows"),
    "infinite loss": (layer(loss_increase={"mamba": float("inf")}), "Infinity"),
    "ratio above 1": (layer(gate_mean=1.5), "layers.0.gate_mean"),
    "unknown layer": (layer(layer=2), "layer 2 does not exist; the model has layers 0 to 1"),
    "negative layer": (layer(layer=-1), "layers.0.layer"),
    "layer 1e9": (layer(layer=10**9), "layers.0.layer"),
    "keeps nothing": (layer(keep="none"), "layers.0.keep"),
    "keeps an empty list": (layer(keep=[]), "layers.0.keep"),
    "layer twice": ({"layers": [{"layer": 0, "keep": "mamba"}, {"layer": 0, "keep": "attention"}]}, "listed twice"),
    "200,000 entries": ({"layers": [{"layer": 0, "keep": "both"}] * 200_000}, "layers: "),
    "another model": (
        {"model": {"fingerprint": "sha256:0", "num_hidden_layers": 2, "hidden_size": 32}},
        "another model",
    ),
}


def refused(made: Path, plan: Path, out: Path, folder: Path) -> str:
    """The one line that says why; the folder is as it was."""
    before = sorted(folder.rglob("*"))
    code, output = call(["export", made / "model", "--plan", plan, "--out", out], made / "out.txt")
    assert code == 2 and "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert sorted(folder.rglob("*")) == before
    return line


@pytest.mark.parametrize(("changes", "said"), PLANS.values(), ids=PLANS.keys())
def test_a_plan_that_cannot_be_is_refused_before_anything_is_written(
    made: Path, tmp_path: Path, changes: dict[str, Any], said: str, fault_figure: Callable[..., None]
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(edited(made, **changes), encoding="utf-8")
    assert said in refused(made, plan, tmp_path / "out", tmp_path)
    fault_figure("plans refused on the command line", 1)


def test_a_plan_of_gigabytes_is_not_read(made: Path, tmp_path: Path) -> None:
    """10^9 entries would be more; the size alone is enough."""
    plan = tmp_path / "plan.json"
    plan.touch()
    os.truncate(plan, 50 * 10**9)
    assert f"at most {MAX_PLAN_BYTES:,} are allowed" in refused(made, plan, tmp_path / "out", tmp_path)


@pytest.mark.parametrize("name", ["link", "model/inside", "file", "full"])
def test_the_output_stays_inside_a_folder_of_its_own(made: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine", encoding="utf-8")
    out = made / name if name.startswith("model") else tmp_path / name
    assert str(out) in refused(made, made / "plan.json", out, tmp_path)
    assert sorted(path.name for path in (made / "model").iterdir() if path.is_dir()) == []
