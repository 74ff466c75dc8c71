import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.errors import CheckpointError
from fusiontree.eval.loading import load_subject
from tests.eval.subjects import hybrid, llama


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("make", [hybrid, llama])
def test_a_saved_model_is_the_same_model(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_subject(tmp_path, device="cpu", batch_size=2)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(ids), model(ids).logits)
    assert (loaded.name, loaded.max_length, loaded.batch_size) == (str(tmp_path), 256, 2)
    assert load_subject(tmp_path, device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert load_subject(tmp_path, device="cpu", max_length=40).max_length == 40


def test_the_tokenizer_may_come_from_elsewhere(folder, tmp_path):
    for file in folder.glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    with pytest.raises(CheckpointError, match=r"has no tokenizer .*--tokenizer"):
        load_subject(folder)
    assert load_subject(folder, tokenizer=tmp_path, device="cpu").generate(["a"], 2)


def _lose_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors"),
    "a weight is missing": (_lose_a_weight, "up_proj"),
    "other shapes": (_other_shape, ""),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), ""),
    "weights are cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), ""),
    "foreign model type": (lambda f: (f / "config.json").write_text('{"model_type": "made-up"}'), "made-up"),
    "no causal model": (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), ""),
    "tokenizer is damaged": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_cannot_be_loaded_is_refused_never_made_up(damage, said, folder):
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_subject(folder, device="cpu")
    assert str(folder) in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


def test_code_in_a_folder_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError):
        load_subject(folder, device="cpu")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "nobody/nothing"])
def test_a_name_that_leads_nowhere(name):
    with pytest.raises(CheckpointError) as caught:
        load_subject(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
