"""The exported folder: ordinary, smaller, proved, atomic; damaged and foreign checkpoints are refused with one line."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusiontree.deploy.export import export_model, export_pruned_model
from fusiontree.deploy.plan import LayerPlan, PrunePlan, identity_of, other_branch, save_plan
from fusiontree.errors import CheckpointError, FusionTreeError, PlanError
from fusiontree.models.loading import load_model
from tests.deploy.tiny import save_tiny, tiny_model

REMOVED = {0: "attention", 2: "mamba"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` and `plan.json`; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny_model(num_hidden_layers=3)
    save_tiny(folder / "model", model)
    layers = [LayerPlan(layer=layer, keep=other_branch(branch)) for layer, branch in REMOVED.items()]
    save_plan(PrunePlan(model=identity_of(model), layers=layers), folder / "plan.json")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_the_export_is_an_ordinary_checkpoint_and_equals_the_masked_original(made: Path, tmp_path: Path) -> None:
    result = export_pruned_model(made / "model", made / "plan.json", tmp_path / "out")
    assert result.removed == REMOVED
    assert result.relative_error < 1e-5
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    original = load_model(made / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("def façade():\n    return 1", return_tensors="pt")["input_ids"]
    with torch.no_grad(), original.branches_removed(REMOVED):
        wanted = original(ids).logits
    with torch.no_grad():
        got = pruned(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert pruned.generate(ids, max_new_tokens=5).shape[1] <= ids.shape[1] + 5


def test_the_weights_are_gone_from_the_file(made: Path, tmp_path: Path) -> None:
    result = export_pruned_model(made / "model", made / "plan.json", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not any("layers.0.mixers.attention" in name or "layers.2.mixers.mamba" in name for name in names)
    assert not any(
        "layers.0.alignment.inputs.attention" in name or "layers.2.alignment.inputs.mamba" in name for name in names
    )
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert result.bytes_after == size < result.bytes_before == (made / "model" / "model.safetensors").stat().st_size
    header = result.bytes_before - 4 * result.parameters_before
    assert abs((result.bytes_before - size) - 4 * (result.parameters_before - result.parameters_after)) < header
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["bytes_after"] == size and record["removed"] == {"0": "attention", "2": "mamba"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_bf16_checkpoint_stays_bf16(made: Path, tmp_path: Path) -> None:
    model = load_model(made / "model", dtype=torch.bfloat16)
    save_tiny(tmp_path / "half", model)
    result = export_pruned_model(tmp_path / "half", made / "plan.json", tmp_path / "out")
    assert result.relative_error < 1e-5
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert {
        name: t.dtype for name, t in load_file(tmp_path / "half" / "model.safetensors").items() if name in stored
    } == {name: t.dtype for name, t in stored.items()}


def test_an_earlier_export_is_replaced_but_no_other_folder(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_pruned_model(made / "model", made / "plan.json", out)
    (out / "left.txt").write_text("old")
    export_pruned_model(made / "model", made / "plan.json", out)
    assert not (out / "left.txt").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not empty"):
        export_pruned_model(made / "model", made / "plan.json", mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]


def test_links_files_and_the_model_itself_are_refused_as_output(copy: Path) -> None:
    (copy / "elsewhere").mkdir()
    (copy / "link").symlink_to(copy / "elsewhere")
    (copy / "file").write_text("x")
    cases = {"link": "symbolic link", "file": "is a file", "model": "not empty", "model/inside": "folder of its own"}
    for name, said in cases.items():
        with pytest.raises(CheckpointError, match=said):
            export_pruned_model(copy / "model", copy / "plan.json", copy / name)
    (copy / ".out.tmp").symlink_to(copy / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        export_pruned_model(copy / "model", copy / "plan.json", copy / "out")
    assert list((copy / "elsewhere").iterdir()) == []


def test_a_plan_for_another_model_writes_nothing(made: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", tiny_model(seed=9, num_hidden_layers=3))
    with pytest.raises(PlanError, match="another model"):
        export_pruned_model(tmp_path / "other", made / "plan.json", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_an_export_that_differs_never_appears(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: Path, **options: Any) -> Any:
        model = load_model(path, **options)
        if path.name != "model":
            model.lm_head.weight.data *= 1.01
        return model

    monkeypatch.setattr("fusiontree.deploy.export.load_model", wrong)
    with pytest.raises(CheckpointError, match="differs from the masked original"):
        export_pruned_model(made / "model", made / "plan.json", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(row=4)
def test_a_full_disk_keeps_the_earlier_export(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export_pruned_model(made / "model", made / "plan.json", out)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((CheckpointError, PlanError), match="No space left"):
        export_pruned_model(made / "model", made / "plan.json", out)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.fault(row=6)
def test_truncated_weights_are_refused(copy: Path) -> None:
    path = copy / "model" / "model.safetensors"
    whole = path.read_bytes()
    draw = random.Random(0)
    for cut in [0, 1, 8, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(12))]:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError) as refusal:
            load_model(copy / "model")
        assert "\n" not in str(refusal.value) and str(copy / "model") in str(refusal.value)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.fusion_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.backdoor"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def outside_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES: list[tuple[str, Any]] = [
    ("no such file", lambda f: (f / "config.json").unlink()),
    ("not valid JSON", lambda f: (f / "config.json").write_text("{")),
    ("model_type 'gpt2'", lambda f: edit_config(f, model_type="gpt2")),
    ("model_type None", lambda f: (f / "config.json").write_text("[]")),
    ("only safetensors", pickle_only),
    ("the weights hold nothing", drop_tensor),
    ("asks for nothing as model.layers.0.backdoor", add_tensor),
    ("not a file in this folder", outside_index),
    ("asks for .* the weights hold", lambda f: edit_config(f, hidden_size=64)),
    ("asks for .* the weights hold", lambda f: edit_config(f, vocab_size=10**9)),
    ("asks for .* the weights hold", lambda f: edit_config(f, gate_rank=10**9)),
    ("layers: 3 entries, but num_hidden_layers=5", lambda f: edit_config(f, num_hidden_layers=5)),
    ("too many", lambda f: edit_config(f, num_hidden_layers=10**9, layers=None)),
    ("hidden_size|cannot be loaded", lambda f: edit_config(f, hidden_size="x")),
    ("layers", lambda f: edit_config(f, layers=[{"mixers": ["rnn"]}] * 3)),
    ("layers|cannot be loaded", lambda f: edit_config(f, layers=7)),
]


@pytest.mark.parametrize(("said", "damage"), DAMAGES, ids=[said for said, _ in DAMAGES])
def test_foreign_and_damaged_folders_are_refused_in_one_line(copy: Path, said: str, damage: Any) -> None:
    damage(copy / "model")
    with pytest.raises(FusionTreeError, match=said) as refusal:
        export_pruned_model(copy / "model", copy / "plan.json", copy / "out")
    assert "\n" not in str(refusal.value)
    assert not (copy / "out").exists()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "nothing")


@pytest.mark.fault(row=27)
def test_remote_code_is_never_run(copy: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').write('ran')\nclass Evil: pass\n"
    (copy / "model" / "evil.py").write_text(code)
    edit_config(copy / "model", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    export_pruned_model(copy / "model", copy / "plan.json", copy / "out")
    assert not canary.exists()
    assert not (copy / "out" / "evil.py").exists()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_checkpoint_becomes_a_model_folder(copy: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Without a plan: the same model, nothing of its training, in another type if asked for."""
    (copy / "model/trainer").mkdir()
    (copy / "model/trainer/state.json").write_text("{}")
    written = export_model(copy / "model", tmp_path / "out", dtype)
    before, now = load_model(copy / "model", dtype=dtype), AutoModelForCausalLM.from_pretrained(written)
    tokens = torch.arange(20).view(1, 20)
    assert now.dtype == (dtype or torch.float32)
    torch.testing.assert_close(now(tokens).logits, before(tokens).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(written) and not (written / "trainer").exists()
    with pytest.raises(CheckpointError, match="folder of its own"):
        export_model(copy / "model", copy / "model/inside")
