"""Row 27: code hidden in files that a loader reads is never run; the file is named; nothing asks on standard input."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from fusiontree.data import SourceConfig, byte_tokenizer, prepare_static
from fusiontree.deploy import InferenceRuntime
from fusiontree.errors import CheckpointError
from fusiontree.models.manifest import MANIFEST, seal
from fusiontree.train import train
from tests.faults.payloads import (
    AUTO_MAP,
    TEMPLATES,
    edit_json,
    plant_everything,
    write_module,
    write_numpy,
    write_pickle,
    write_torch,
)
from tests.faults.process import call
from tests.train.tiny import state_hashes, tiny_config, tiny_file, write_text

pytestmark = pytest.mark.fault(row=27)
Words = list[str | Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps in `run/` and its last model, without the training state, in `model/`."""
    folder = tmp_path_factory.mktemp("made")
    train(tiny_config(folder, training__steps=4))
    last = folder / "run" / "checkpoints" / "step-00000004"
    shutil.copytree(last, folder / "model", ignore=shutil.ignore_patterns("trainer", MANIFEST))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def run(words: Words, place: Path, canary: Path) -> tuple[int, str]:
    """Exit code and output of a command that ran no hidden code and asked nothing."""
    code, output = call(words, place / "out.txt")
    assert not canary.exists(), output
    assert "Traceback" not in output and "Do you wish" not in output, output
    return code, output


def assert_refused(words: Words, place: Path, canary: Path, said: str | Path) -> None:
    """It ends with one line that names `said`."""
    code, output = run(words, place, canary)
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert str(said) in line, line


def test_the_payloads_are_live(tmp_path: Path, canary: Path) -> None:
    """Each does write the canary in a reader that trusts it; torch's own distributed checkpoints are such a reader."""

    def ran() -> bool:
        found = canary.exists()
        canary.unlink(missing_ok=True)
        return found

    write_pickle(tmp_path / "a", canary)
    pickle.loads((tmp_path / "a").read_bytes())  # noqa: S301
    assert ran()
    write_torch(tmp_path / "a.pt", canary)
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert ran()
    write_numpy(tmp_path / "a.npy", canary)
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert ran()
    write_pickle(tmp_path / "dcp" / ".metadata", canary)
    with pytest.raises(BaseException):  # which comes too late  # noqa: B017
        dcp.load({"w": torch.zeros(1)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert ran()
    jinja2.Environment().from_string(TEMPLATES["globals of a global"].replace("CANARY", str(canary))).render()
    assert ran()


def test_everything_at_once_beside_good_weights_is_not_touched(
    place: Path, canary: Path, fault_figure: Callable[..., None]
) -> None:
    """All verbs that read a model folder work on, or refuse; nothing that was planted is copied by an export."""
    model, teacher = place / "model", place / "teacher"
    shutil.copytree(model, teacher)
    for folder in (model, teacher):
        plant_everything(folder, canary)
    text = write_text(place / "held.txt")
    plan, out = place / "plan.json", place / "out"
    commands: dict[str, Words] = {
        "generate": ["generate", model, "--prompt", "the gate", "--max-new-tokens", "2"],
        "chat": ["chat", model],
        "info": ["info", model],
        "prune": ["prune", model, "--data", text, "--max-loss-increase", "9", "--length", "32", "--batches", "1",
                  "--batch-size", "2", "--out", plan],
        "export": ["export", model, "--plan", plan, "--out", out],
        "train": ["train", taught(place, teacher)],
        "tokenizer": ["train", tiny_file(place, data__tokenizer={"path": str(model)}, training__steps=2,
                                         system__run_dir=str(place / "third"))],
    }  # fmt: skip
    for verb, words in commands.items():
        code, output = run(words, place, canary)
        assert code == 0, (verb, output)
        fault_figure("commands on a folder full of payloads", 1)
    names = {path.name for path in out.iterdir()}
    assert "model.safetensors" in names and not {"evil.py", "pytorch_model.bin", ".metadata"} & names


def taught(place: Path, teacher: Path, **changes: Any) -> Path:
    """A config of a run with a teacher."""
    return tiny_file(
        place,
        training__teacher=str(teacher),
        training__loss={"distill_weight": 1.0},
        training__steps=2,
        system__run_dir=str(place / "student"),
        **changes,
    )


def replace_by(name: str, write: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """A damage: a pickle under the name of a good file."""

    def damage(folder: Path, canary: Path) -> None:
        (folder / name).unlink()
        write(folder / name, canary)

    return damage


def only_a_pickle(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_torch(folder / "pytorch_model.bin", canary)


def index_of_pickles(folder: Path, canary: Path) -> None:
    only_a_pickle(folder, canary)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def unknown_kind(folder: Path, canary: Path) -> None:
    """transformers would ask on standard input whether to run evil.py."""
    write_module(folder / "evil.py", canary)
    edit_json(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)


def unknown_tokenizer(folder: Path, canary: Path) -> None:
    write_module(folder / "evil.py", canary)
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=AUTO_MAP)


REPLACED = {
    "only a pickle": only_a_pickle,
    "index of pickles": index_of_pickles,
    "weights are a torch pickle": replace_by("model.safetensors", write_torch),
    "weights are a pickle": replace_by("model.safetensors", write_pickle),
    "config is a pickle": replace_by("config.json", write_pickle),
    "unknown kind with code": unknown_kind,
    "tokenizer is a pickle": replace_by("tokenizer.json", write_pickle),
    "unknown tokenizer with code": unknown_tokenizer,
}


@pytest.mark.parametrize("damage", REPLACED.values(), ids=REPLACED.keys())
def test_code_in_the_place_of_a_model_is_refused_by_name(
    place: Path, canary: Path, damage: Callable[[Path, Path], None]
) -> None:
    model = place / "model"
    damage(model, canary)
    assert_refused(["generate", model, "--prompt", "a"], place, canary, model)
    assert_refused(["train", taught(place, model)], place, canary, model)


@pytest.mark.parametrize("name", ["model", "trainer/optimizer", "trainer/state"])
@pytest.mark.parametrize("write", [write_torch, write_pickle])
def test_a_pickle_in_the_place_of_training_state_is_refused_even_with_a_true_manifest(
    place: Path, canary: Path, name: str, write: Callable[[Path, Path], None]
) -> None:
    """Whoever can write the folder can seal it; only the format of the files is left to protect the reader."""
    last = place / "run" / "checkpoints" / "step-00000004"
    replace_by(f"{name}.safetensors", write)(last, canary)
    reseal(last)
    assert_refused(["train", going_on(place)], place, canary, last)


def going_on(place: Path) -> Path:
    """The run's config in its new place, for more steps."""
    return tiny_file(place, training__steps=8, data__train=[{"path": str(place / "text.txt"), "separator": "\n\n"}])


def reseal(folder: Path, **settings: Any) -> None:
    """Make the manifest true again; the settings are those of a run in this very place."""
    path = folder / "trainer" / "state.json"
    text = path.read_text(encoding="utf-8")
    old = json.loads(text)["settings"]["data.train"][0]["path"]
    path.write_text(text.replace(old, str(folder.parents[2] / "text.txt")), encoding="utf-8")
    (folder / MANIFEST).unlink()
    seal(folder, {"step": 4, "config_hash": "", "world_size": 1})


def test_a_pickle_as_the_json_of_a_training_state_is_refused(place: Path, canary: Path) -> None:
    last = place / "run" / "checkpoints" / "step-00000004"
    reseal(last)
    (last / MANIFEST).unlink()
    replace_by("trainer/state.json", write_pickle)(last, canary)
    seal(last, {"step": 4})
    assert_refused(["train", going_on(place)], place, canary, last)


def test_folders_of_other_trainers_inside_a_checkpoint_are_not_read(place: Path, canary: Path) -> None:
    """Sealed in, such files are carried along untouched; the run goes on as it would have without them."""
    last = place / "run" / "checkpoints" / "step-00000004"
    for name in (".metadata", "trainer/__0_0.distcp", "global_step4/zero_pp_rank_0.pt", "trainer/rng_state.pth"):
        write_pickle(last / name, canary)
    reseal(last)
    before = state_hashes(place / "run")
    code, output = run(["train", going_on(place)], place, canary)
    assert code == 0, output
    assert before.items() <= state_hashes(place / "run").items()


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_template_that_reaches_out_is_refused_by_name(place: Path, canary: Path, template: str) -> None:
    model = place / "model"
    for old in model.glob("chat_template*"):
        old.unlink()
    edit_json(model / "tokenizer_config.json", chat_template=template.replace("CANARY", str(canary)))
    runtime = InferenceRuntime(model, device="cpu")
    with pytest.raises(CheckpointError, match="the chat template cannot be used") as caught:
        runtime.chat([{"role": "user", "content": "a"}], max_new_tokens=2)
    assert str(model) in str(caught.value) and "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["offsets.npy", "hashes.npy", "origins.npy", "meta.json"])
def test_prepared_tokens_are_never_unpickled(place: Path, canary: Path, name: str) -> None:
    tokens = place / "tokens"
    prepare_static([SourceConfig(path=str(place / "text.txt"), separator="\n\n")], byte_tokenizer(), tokens)
    (tokens / name).unlink()
    (write_numpy if name.endswith(".npy") else write_pickle)(tokens / name, canary)
    config = tiny_file(place, data__train=[{"path": str(tokens), "mode": "static"}], system__run_dir=str(place / "new"))
    assert_refused(["train", config], place, canary, tokens)


def test_a_session_is_never_unpickled(place: Path, canary: Path) -> None:
    from fusiontree.models.manifest import sha256_of

    runtime = InferenceRuntime(place / "model", device="cpu")
    session = runtime.start_session("the gate")
    session.generate(max_new_tokens=2)
    saved = session.save(place / "saved")
    replace_by("cache.safetensors", write_torch)(saved, canary)
    edit_json(saved / "session.json", cache_sha256=sha256_of(saved / "cache.safetensors"))
    with pytest.raises(CheckpointError, match="saved"):
        runtime.restore_session(saved)
    assert not canary.exists()


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"]
)
def test_a_config_that_names_python_is_refused(place: Path, canary: Path, tag: str) -> None:
    path = place / "evil.yaml"
    path.write_text(f"training: !!{tag} ['touch {canary}']\n", encoding="utf-8")
    assert_refused(["train", path], place, canary, path)
