"""Model folders of transformers become ours and go back; what is none, or has no counterpart, leaves nothing behind."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.deploy.convert import convert_model
from fusiontree.errors import CheckpointError, ConfigError
from fusiontree.models.loading import load_model

SIZES = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    GPT2LMHeadModel(GPT2Config(**SIZES, initializer_range=0.2)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_there_and_back(gpt2: Path, tmp_path: Path) -> None:
    ours, again = tmp_path / "ours", tmp_path / "again"
    assert convert_model(gpt2, ours) == "fusiontree" and convert_model(ours, again, "gpt2") == "gpt2"
    assert (ours / "tokenizer.json").read_bytes() == (gpt2 / "tokenizer.json").read_bytes()
    assert json.loads((ours / "conversion.json").read_text())["from"] == "gpt2"
    theirs, back = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (gpt2, again))
    assert theirs.keys() == back.keys() and all(torch.equal(theirs[name], back[name]) for name in theirs)
    assert load_model(ours).config.position_encoding == "learned"


@pytest.mark.parametrize(
    ("to", "error", "words"),
    [("llama", ConfigError, "becomes fusiontree first"), ("gpt2", ConfigError, "becomes fusiontree first")],
)
def test_one_step_at_a_time(gpt2: Path, tmp_path: Path, to: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        convert_model(gpt2, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_had_is_refused(gpt2: Path, tmp_path: Path) -> None:
    ours, out = tmp_path / "ours", tmp_path / "out"
    convert_model(gpt2, ours)
    with pytest.raises(ConfigError, match="is FusionTree's already; say what it is to become: llama"):
        convert_model(ours, out)
    with pytest.raises(ConfigError, match="llama has no norm_type='layer'"):
        convert_model(ours, out, "llama")
    with pytest.raises(ConfigError, match="model_type='opt' cannot be converted; there are llama"):
        convert_model(ours, out, "opt")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        convert_model(tmp_path / "nowhere", out)
    with pytest.raises(CheckpointError, match="not empty"):
        convert_model(gpt2, tmp_path)
    (ours / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError):
        convert_model(ours, out, "gpt2")
    (ours / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(CheckpointError, match="model_type 'opt'; there are llama"):
        convert_model(ours, out)
    assert not out.exists()
