"""Settings: strict, named in every complaint, and written back as they were read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusiontree.errors import ConfigError
from fusiontree.train.config import RunConfig, load_config, parse_config
from fusiontree.train.yaml_files import read_yaml, write_yaml
from tests.train.tiny import tiny_config, tiny_content, tiny_file


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    path = tmp_path / "written.yaml"
    path.write_text(write_yaml(config.model_dump(mode="json")), encoding="utf-8")
    assert load_config(path) == config


def test_overrides_are_read_as_yaml(tmp_path: Path) -> None:
    overrides = ["training.lr=1e-3", "training.loss.balance_weight=0", "logging.wandb=true", "training.save_every=null"]
    config = load_config(tiny_file(tmp_path), [*overrides, "data.train.0.min_length=3", "model.gate_rank=8"])
    assert config.training.lr == 1e-3 and isinstance(config.training.lr, float)
    assert config.training.loss.balance_weight == 0
    assert config.logging.wandb is True
    assert config.training.save_every is None
    assert config.data.train[0].min_length == 3
    assert config.model["gate_rank"] == 8


WRONG = [
    ("training.lrr=1", "training.lrr: unknown key; did you mean 'lr'?"),
    ("trainig.lr=1", "trainig: unknown key; did you mean 'training'?"),
    ("training.loss.ballance_weight=1", "did you mean 'balance_weight'?"),
    ("data.train.0.pth=x", "data.train.0.pth: unknown key; did you mean 'path'?"),
    ("model.hiden_size=64", "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
    ("model.zzz=64", "allowed: "),
    ("training.steps=many", "training.steps: input should be a valid integer, not 'many'"),
    ("training.steps=1.5", "training.steps"),
    ("training.steps='100'", "training.steps"),
    ("training.steps=0", "greater than or equal to 1, not 0"),
    ("training.compile=1", "training.compile: input should be a valid boolean, not 1"),
    (
        "training.schedule=cosin",
        "training.schedule: input should be 'cosine', 'linear', 'constant' or 'wsd', not 'cosin'",
    ),
    ("training.lr=-1", "training.lr: input should be greater than 0, not -1"),
    ("training.lr=.nan", "training.lr"),
    ("training.lr=.inf", "training.lr"),
    ("training.warmup_steps=99", "training: warmup_steps 99 is more than steps 8"),
    ("model.hidden_size=33", "model."),
    ("model.hidden_size=true", "model.hidden_size: input should be a valid integer, not True"),
    ("model.srte_shared=1", "model.srte_shared: input should be a valid boolean"),
    ("model.num_key_value_heads=3", "model.num_key_value_heads=3: must divide num_attention_heads=2"),
    ("model.max_position_embeddings=16", "training.sequence_length 32 is more than model.max_position_embeddings 16"),
    ("model=3", "model: is 3; expected key: value pairs"),
    ("training=3", "training: is 3; expected key: value pairs"),
    ("logging=null", "logging: is empty; expected key: value pairs, or leave it out"),
    ("data.train.0=text.txt", "data.train.0: is 'text.txt'; expected key: value pairs"),
    ("model.num_heads=2", "'num_attention_heads'"),
    ("training.loss.specialise_after=1.5", "less than or equal to 1"),
    ("system.device=tpu", "input should be 'auto', 'cpu' or 'cuda', not 'tpu'"),
]


@pytest.mark.parametrize(("override", "expected"), WRONG)
def test_a_wrong_setting_is_named_in_one_line(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny_file(tmp_path), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "config.yaml" in str(caught.value)


def test_every_wrong_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.steps.*training\.lrr"):
        load_config(tiny_file(tmp_path), ["training.steps=x", "training.lrr=1"])


@pytest.mark.parametrize(
    "override", ["training.lr", "=1", "training..lr=1", "training.lr.x=1", "data.train.5.path=x", "training.lr= "]
)
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(tiny_file(tmp_path), [override])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty; expected sections"),
        ("# only a remark", "is empty"),
        ("- 1", "expected sections"),
        ("a: [", "not valid YAML: line 1, column 5: expected the node content"),
        ("model:\n\thidden_size: 3", r"line 2, column 1: found character '\\t'"),
        ("model: {}\nmodel: {}", "line 2, column 1: key 'model' is given twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("model: {}", "training: is required"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        load_config(path)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="is a folder; give a YAML file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("2.5", 2.5),
        (".5", 0.5),
        ("3", 3),
        ("-1e3", -1e3),
        ("1e", "1e"),
        ("v1", "v1"),
        ("~", None),
    ],
)
def test_numbers_are_read_as_people_write_them(tmp_path: Path, text: str, value: Any) -> None:
    path = tmp_path / "n.yaml"
    path.write_text(f"x: {text}", encoding="utf-8")
    found = read_yaml(path)["x"]
    assert found == value and type(found) is type(value)


def test_settings_do_not_change_after_reading(tmp_path: Path) -> None:
    config = parse_config(tiny_content(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.training.lr = 1.0  # type: ignore[misc]
    assert isinstance(config, RunConfig)
