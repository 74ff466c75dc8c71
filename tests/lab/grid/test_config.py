import pytest

from fusiontree.errors import ConfigError
from fusiontree.lab.grid.changes import CHANGES
from fusiontree.lab.grid.config import AblateConfig, CompareConfig, parse_grid
from fusiontree.lab.grid.matching import contenders
from fusiontree.lab.grid.options import read_grid
from fusiontree.models.presets import preset
from tests.lab.grid.tiny import MODEL, content, tiny_ablation, tiny_file, tiny_grid

LENGTH = 32


def test_the_shipped_grids_are_read_and_can_be_sized():
    compare, ablate = (read_grid(kind, None, {}) for kind in ("compare", "ablate"))
    for found in contenders(compare, 2048).values():
        assert abs(found.off) < 0.05 and abs(found.parameters / 2.5e6 - 1) < 0.05
    assert next(iter(contenders(ablate, 2048))) == "base"


def test_options_and_overrides_win_over_the_file(tmp_path):
    path = tiny_file(tmp_path)
    options = {"training.steps": 7, "architectures": {"fusiontree": None}}
    grid = read_grid("compare", path, options, ["training.steps=9", "seeds=[3, 4]"])
    assert grid.training.steps == 9 and grid.seeds == [3, 4] and list(grid.named()) == ["fusiontree"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "has one twice"),
        ({"sweep": {"lrs": [1e-3]}}, "training.lr: has no effect beside sweep"),
        ({"match": {"by": "parameters"}}, "needs their number"),
        ({"match": {"by": "tokens", "parameters": 1e6}}, "no effect with by: tokens"),
        ({"match": {"by": "parameters", "parameters": 1e6, "flops": 1e9}}, "no effect with by: parameters"),
        ({"match": {"by": "size"}}, "match.by"),
        ({"measure": {"length_multiples": [2, 3]}}, "2 does not divide the largest, 3"),
        ({"architectures": {"a/b": {"preset": "llama"}}}, "becomes a folder"),
        ({"architectures": {}}, "architectures"),
        ({"architectures": {"llama": {"widht": 3}}}, "architectures.llama.widht: unknown key"),
        ({"measurre": {}}, "did you mean 'measure'"),
    ],
)
def test_a_wrong_grid_is_one_line(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_grid(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": {"rnn": None}}, "architectures.rnn: preset 'rnn' does not exist; there are .*llama"),
        ({"architectures": {"x": {"preset": "llama", "model": {"hiden_size": 8}}}}, "did you mean 'hidden_size'"),
        ({"architectures": {"llama": {"model": {"srte": "magic"}}}}, "must be one of .*sincos"),
        ({"architectures": {"llama": {"model": {"vocab_size": 300}}}}, "vocab_size 300, but the tokenizer .* 258"),
        ({"model": {"max_position_embeddings": 8}}, "max_position_embeddings 8 is less than the 32"),
        ({"match": {"by": "parameters", "parameters": 1000.0}}, "no sizes come within"),
        ({"match": {"by": "flops", "flops": 1e3}, "training": {"steps": 4, "sequence_length": 32, "micro_batch_size": 2,
          "warmup_steps": 2}}, "raise match.flops"),
    ],
)  # fmt: skip
def test_architectures_that_cannot_be_are_one_line(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        contenders(tiny_grid(tmp_path, **changes), 258)


def test_an_unknown_change_says_which_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"changes.no_gates: not known by name; there are .*no_srte"):
        tiny_ablation(tmp_path, changes={"no_gates": None})
    with pytest.raises(ConfigError, match=r"base\.preset: is required"):
        tiny_ablation(tmp_path, base={})


@pytest.mark.parametrize("name", CHANGES)
def test_every_named_change_makes_another_model(name):
    sizes = {**MODEL, "vocab_size": 64, "norm_placement": "sandwich", "sliding_window": 8}
    if name == "sandwich_norm":
        sizes["norm_placement"] = "pre"
    base, changed = preset("fusiontree", **sizes), preset("fusiontree", **{**sizes, **CHANGES[name]})
    assert base.to_dict() != changed.to_dict()


def test_matched_by_tokens_all_have_the_same_budget(tmp_path):
    found = contenders(tiny_grid(tmp_path), 258)
    assert {each.tokens for each in found.values()} == {4 * 2 * LENGTH}
    assert found["llama"].parameters != found["mamba2"].parameters
    for each in found.values():  # what the runs are made from is what was counted
        assert preset(each.preset, vocab_size=258, max_position_embeddings=LENGTH, **MODEL).to_dict() == (
            each.config.to_dict()
        )


def test_matched_by_parameters_the_sizes_come_close(tmp_path):
    grid = tiny_grid(tmp_path, match={"by": "parameters", "parameters": 3e5}, model={})
    found = contenders(grid, 258)
    assert all(abs(each.parameters / 3e5 - 1) == abs(each.off) < 0.05 for each in found.values())
    assert {each.steps for each in found.values()} == {4}


def test_matched_by_flops_the_steps_differ_and_the_work_does_not(tmp_path):
    training = {"steps": 100, "sequence_length": 32, "micro_batch_size": 2}
    found = contenders(tiny_grid(tmp_path, match={"by": "flops"}, training=training), 258)
    llama, mamba = found["llama"], found["mamba2"]
    assert llama.steps == 100 and llama.off == 0 and mamba.steps > 100
    assert abs(mamba.training_flops / llama.training_flops - 1) == pytest.approx(abs(mamba.off)) and mamba.off < 0.01
    assert llama.cost(50) == pytest.approx(llama.training_flops / 2)


def test_both_kinds_refuse_each_others_files(tmp_path):
    with pytest.raises(ConfigError, match="base: is required"):
        parse_grid(AblateConfig, content(tmp_path), "grid")
    with pytest.raises(ConfigError, match="architectures: is required"):
        parse_grid(CompareConfig, {"training": {}}, "grid")
