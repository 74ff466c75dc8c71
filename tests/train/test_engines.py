"""DDP, FSDP2 and DeepSpeed ZeRO train as one process does, and each goes on from what any other saved."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from fusiontree import HybridLanguageModel
from fusiontree.train import latest_checkpoint
from tests.train.processes import launch, once, run_job, samples
from tests.train.tiny import lines, tiny_content, write_text

STEPS, MIDDLE = 20, 10
ENGINES = ("ddp", "fsdp", "zero2", "zero3")
DEEPSPEED = {
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}
SETTINGS: dict[str, Any] = {
    "training__steps": STEPS,
    "training__micro_batch_size": 2,
    "training__accumulation_steps": 4,
    "training__save_every": MIDDLE,
    "training__validation_every": MIDDLE,
    "training__validation_batches": 3,
    "training__loss": {"entropy_weight": 0.1, "sharpen_weight": 0.1},
    "probes": {"every": MIDDLE, "recall_pairs": [3], "recall_questions": 12, "perplexity_tokens": 64},
    "model__num_hidden_layers": 3,
    "model__drop_branch_prob": 0.0,
    "system__timeout": 60,
}
# What else must not depend on the number of processes, in runs of a few steps: name -> settings.
OTHERS: dict[str, dict[str, Any]] = {
    "padded, branches dropped": {"data__packing": False, "model__drop_branch_prob": 0.3},
    "taught, curriculum": {"training__curriculum": [[16, 2], [32, 2]]},
    "muon, recomputed": {"training__optimizer": "muon", "training__activation_checkpointing": "branches"},
}


@dataclass(frozen=True)
class Place:
    """Where the runs of this module are, and the settings files of DeepSpeed."""

    folder: Path

    def content(self, name: str, engine: str = "single", **changes: Any) -> dict[str, Any]:
        engines = {"system__engine": engine}
        if engine in DEEPSPEED:
            engines = {"system__engine": "deepspeed", "system__deepspeed": str(self.folder / f"{engine}.json")}
        return tiny_content(
            self.folder, **{**SETTINGS, **engines, "system__run_dir": str(self.run_dir(name)), **changes}
        )

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def halfway(self, source: str, name: str) -> None:
        """Make the run `name` out of what the run `source` had in the middle."""
        old, new = self.run_dir(source), self.run_dir(name)
        shutil.copytree(old / "tokenizer", new / "tokenizer")
        step = f"checkpoints/step-{MIDDLE:08d}"
        shutil.copytree(old / step, new / step)

    def short(self, name: str, engine: str, run: str) -> dict[str, Any]:
        changes = {"training__steps": 4, "training__save_every": None, "training__validation_every": None, "probes": {}}
        taught = {"training__loss": {"distill_weight": 0.5}, "training__teacher": str(self.teacher)}
        return self.content(run, engine, **{**changes, **(taught if "taught" in name else {}), **OTHERS[name]})

    @property
    def teacher(self) -> Path:
        return self.run_dir("single") / f"checkpoints/step-{STEPS:08d}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One process trains, and two with each engine; DeepSpeed, which keeps global state, apart from the others."""
    return Place(once(tmp_path_factory, "engines", train_all))


def train_all(folder: Path) -> None:
    """Every run that several tests look at."""
    place = Place(folder)
    write_text(place.folder / "text.txt", documents=200)
    for name, content in DEEPSPEED.items():
        (place.folder / f"{name}.json").write_text(json.dumps(content))
    run_job(place.content("single"))
    for name in OTHERS:
        run_job(place.short(name, "single", f"{name} alone"))
    place.halfway("single", "single then fsdp")
    jobs = [place.content("ddp", "ddp"), place.content("fsdp", "fsdp"), place.content("single then fsdp", "fsdp")]
    launch(2, [*jobs, *(place.short(name, "ddp", f"{name} ddp") for name in OTHERS)], place.folder)
    place.halfway("fsdp", "fsdp then zero2")
    launch(2, [place.content("zero2", "zero2"), place.content("fsdp then zero2", "zero2")], place.folder)
    place.halfway("ddp", "ddp then zero3")
    launch(2, [place.content("zero3", "zero3"), place.content("ddp then zero3", "zero3")], place.folder)


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(run_dir) if "loss" in line}


def validations(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["validation_loss"] for line in lines(run_dir) if "validation_loss" in line}


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_have_the_losses_of_one(place: Place, engine: str) -> None:
    one, two = (lines(place.run_dir(name)) for name in ("single", engine))
    assert [line.keys() for line in one] == [line.keys() for line in two] and len(one) == STEPS + 3 + 3
    for before, now in zip(one, two, strict=True):
        assert now == pytest.approx(before, rel=1e-5, abs=1e-5), f"step {before['step']}"


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_end_with_the_weights_of_one(place: Place, engine: str) -> None:
    one, two = (
        load_file(place.run_dir(name) / f"checkpoints/step-{STEPS:08d}/model.safetensors")
        for name in ("single", engine)
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_step_has_the_samples_of_one_process(place: Place, engine: str) -> None:
    one = samples(place.run_dir("single"))
    assert len(one) == STEPS and len({sample for ids in one.values() for sample in ids}) == 8 * STEPS
    assert samples(place.run_dir(engine)) == one


@pytest.mark.fault(row=11)
@pytest.mark.parametrize("run", ["single then fsdp", "fsdp then zero2", "ddp then zero3"])
def test_any_engine_goes_on_from_the_checkpoint_of_another(place: Place, run: str) -> None:
    assert_goes_on(place, run)


@pytest.mark.fault(row=11)
@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_goes_on_from_two(place: Place, engine: str) -> None:
    place.halfway(engine, f"{engine} then single")
    run_job(place.content(f"{engine} then single"))
    assert_goes_on(place, f"{engine} then single")


@pytest.mark.fault(row=11)
def test_four_processes_go_on_from_two(place: Place) -> None:
    place.halfway("zero3", "zero3 then ddp on 4")
    place.halfway("ddp", "ddp then fsdp on 4")
    jobs = [place.content("zero3 then ddp on 4", "ddp"), place.content("ddp then fsdp on 4", "fsdp")]
    launch(4, jobs, place.folder)
    for run in ("zero3 then ddp on 4", "ddp then fsdp on 4"):
        assert_goes_on(place, run)


def assert_goes_on(place: Place, run: str) -> None:
    """The second half of the run is that of the run in one process, in losses and in samples."""
    one, other = losses(place.run_dir("single")), losses(place.run_dir(run))
    assert set(other) == set(range(MIDDLE + 1, STEPS + 1))
    assert other == pytest.approx({step: one[step] for step in other}, rel=1e-4)
    end = validations(place.run_dir("single"))[STEPS]
    assert validations(place.run_dir(run))[STEPS] == pytest.approx(end, rel=1e-4)
    whole = samples(place.run_dir("single"))
    assert samples(place.run_dir(run)) == {step: whole[step] for step in other}


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_does_not_depend_on_how_it_is_divided(place: Place, name: str) -> None:
    """Padding of unequal size, dropped branches, a teacher, changing lengths: every term of the loss stays."""
    one, two = (lines(place.run_dir(f"{name} {how}")) for how in ("alone", "ddp"))
    assert len(one) == 6
    assert ("distill_loss" in one[1]) == ("taught" in name)
    for before, now in zip(one, two, strict=True):
        assert now == pytest.approx(before, rel=1e-5, abs=1e-5), f"step {before['step']}"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_any_engine_is_a_model_folder(place: Place, engine: str) -> None:
    """Also: nothing in it is a pickle."""
    folder = latest_checkpoint(place.run_dir(engine))
    assert folder is not None
    model = HybridLanguageModel.from_pretrained(folder)
    assert type(model) is HybridLanguageModel and model.config.architectures == ["HybridLanguageModel"]
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt", ".jinja"}
