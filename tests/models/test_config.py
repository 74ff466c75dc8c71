"""The config: what is wrong is refused in one line, what is right survives files, every setting changes something."""

import json
from dataclasses import fields

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from fusiontree.errors import ConfigError
from fusiontree.models import HybridConfig, HybridLanguageModel, preset
from fusiontree.models.presets import PRESETS
from tests.models.kinds import BASE, GRANULARITIES, KINDS, config_of, draw_weights, tokens

NAN, INF = float("nan"), float("inf")
REFUSED = {
    "vocab_size": [0, -1, 1.5, True, "x", None],
    "hidden_size": ["32", 0, 30, None],
    "num_hidden_layers": [0, None, 2.0],
    "num_attention_heads": ["4", 0, 2.0, 5],
    "num_key_value_heads": [3, 0, "2"],
    "head_dim": [7, 0, 1.5],
    "sliding_window": [0, 1.5, True, "5"],
    "global_heads": [-1, 5, 1.0, None, True],
    "rope_theta": [-1, 0, NAN, INF, "x"],
    "rope_scaling": ["longrope", None],
    "rope_factor": [0, -2.0, NAN, "2"],
    "max_position_embeddings": [0, None],
    "mamba_d_state": [0],
    "mamba_d_conv": [0],
    "mamba_expand": [0, NAN, INF, "2"],
    "mamba_head_dim": [7, 0],
    "mamba_n_groups": [3, 0],
    "mamba_chunk_size": [0],
    "mamba_dt_limit": [(1,), (2, 1), "xy", (-1, 1), None, (0, NAN), ("a", "b"), (INF, INF)],
    "srte": ["x", None, ["sincos"]],
    "srte_rank": [0],
    "srte_shared": ["no", 1],
    "gate_rank": [0],
    "gate_granularity": ["x", None],
    "cross_rank": [-1, 1.5, None, True],
    "window_growth": [0, 3, 2.0, True, None],
    "norm_placement": ["x", None],
    "norm_eps": [0, -1e-6, NAN],
    "mlp_type": ["x"],
    "intermediate_size": [0],
    "hidden_act": ["x"],
    "drop_branch_prob": [1.0, -0.1, "x", NAN],
    "checkpointing": ["x"],
    "tie_word_embeddings": [3],
    "initializer_range": [-1, "x", NAN],
    "use_cache": ["x"],
    "block": ["x", None],
    "position_encoding": ["x", None],
    "global_position_encoding": ["learned", 3],
    "rope_original_length": [0, 1.5],
    "mamba_type": ["mamba3", None],
    "mamba_dt_rank": [0, "4"],
    "fusion_rule": ["x", None],
    "alignment": ["x", 1],
    "norm_type": ["x", None],
    "attention_bias": [1],
    "mlp_bias": ["x"],
    "embedding_norm": [0],
    "parallel_norms": [0, 3, True],
    "num_experts": [0, 1.5],
    "experts_per_token": [0, 2],
    "mixers": ["mamba", [], ["mlp"], 3],
}
REFUSED_LAYERS = [
    ([{}], "layers: 1 entries, but num_hidden_layers=2"),
    (3, "layers=3"),
    ("ab", "layers='ab'"),
    ([1, 2], "must be a list with one mapping per layer"),
    ([{"foo": 1}, {}], r"layers\[0\]: unknown key 'foo'; allowed: block, mixers"),
    ([{}, {"mixers": "mamba"}], r"layers\[1\].mixers='mamba'"),
    ([{}, {"mixers": None}], r"layers\[1\].mixers=None"),
    ([{}, {"mixers": []}], r"layers\[1\].mixers=\[\]"),
    ([{}, {"mixers": ["mamba", "mamba"]}], "each once"),
    ([{}, {"mixers": ["mlp"]}], "mamba, attention or both"),
    ([{}, {"mixers": [1]}], "mamba, attention or both"),
    ([{"block": "x"}, {}], "must be one of hybrid, sequential, parallel"),
    ([{"block": "sequential"}, {}], "two mixers in a sequential block need sum or mean"),
    ([{"block": "parallel"}, {}], "two mixers in a parallel block need sum or mean"),
    ([{"sliding_window": 0}, {}], r"layers\[0\].sliding_window=0"),
    ([{"global_heads": 9}, {}], "between 0 and num_attention_heads=4"),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_wrong_value_is_refused_in_one_line(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        HybridConfig(**{**BASE, name: value})
    words = str(error.value)
    named = (name, "hidden_size", "mamba_expand") if name == "num_attention_heads" else (name, "hidden_size=30")
    assert any(word in words for word in named) and "\n" not in words and len(words) < 200
    assert str(value) in words or repr(value) in words


@pytest.mark.parametrize(("layers", "words"), REFUSED_LAYERS)
def test_a_wrong_layer_list_is_refused_in_one_line(layers: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        HybridConfig(**{**BASE, "layers": layers})
    assert "\n" not in str(error.value)


def test_attention_sizes_matter_only_where_there_is_attention() -> None:
    mamba = [{"mixers": ["mamba"]}] * 2
    assert HybridConfig(**{**BASE, "layers": mamba, "num_key_value_heads": 3})
    assert HybridConfig(**{**BASE, "layers": [{"mixers": ["attention"]}] * 2, "mamba_head_dim": 7})


@pytest.mark.parametrize("kind", KINDS)
def test_json_round_trip(kind: str, tmp_path) -> None:
    config = config_of(kind)
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HybridConfig and again.layers == config.layers and again.layer_specs == config.layer_specs
    for name in HybridConfig.__annotations__:
        ours, theirs = getattr(config, name), getattr(again, name)
        assert (list(ours) == list(theirs)) if isinstance(ours, (list, tuple)) else ours == theirs, name


def test_auto_classes() -> None:
    config = AutoConfig.for_model("fusiontree", **BASE)
    assert type(config) is HybridConfig
    assert type(AutoModelForCausalLM.from_config(config)) is HybridLanguageModel


def test_layers_are_filled_in_and_each_its_own() -> None:
    config = HybridConfig(**BASE)
    assert (
        config.layers
        == [{"block": "hybrid", "mixers": ["mamba", "attention"], "sliding_window": 5, "global_heads": 1}] * 2
    )
    config.layers[0]["sliding_window"] = 9
    assert config.layers[1]["sliding_window"] == 5
    order = HybridConfig(**{**BASE, "layers": [{"mixers": ["attention", "mamba"]}, {}]})
    assert order.layers[0]["mixers"] == ["mamba", "attention"]


def test_windows_double_over_the_depth() -> None:
    def windows(growth: int, count: int, **more: object) -> list:
        settings = {"num_hidden_layers": count, "window_growth": growth, "sliding_window": 5, **more}
        return [layer["sliding_window"] for layer in HybridConfig(**{**BASE, **settings}).layers]

    assert windows(1, 3) == [5, 5, 5]
    assert windows(2, 4) == [5, 5, 10, 10]
    assert windows(8, 8) == [5, 5, 10, 10, 20, 20, 40, 40]
    assert windows(8, 2) == [5, 40]
    # The list is the truth: what an entry says stays, and a config that went through a file has all entries filled in.
    assert windows(4, 3, layers=[{}, {"sliding_window": 7}, {"sliding_window": None}]) == [5, 7, None]
    config = HybridConfig(**{**BASE, "window_growth": 2})
    config.layers[1]["sliding_window"] = 3
    assert [layer["sliding_window"] for layer in HybridConfig(**config.to_dict()).layers] == [5, 3]


@pytest.mark.parametrize("wrong", [{"sliding_window": None}, {"num_hidden_layers": 1}])
def test_a_pyramid_needs_a_window_and_layers(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="window_growth=2: needs a sliding_window and at least two layers"):
        HybridConfig(**{**BASE, "window_growth": 2, **wrong})


def test_heads_of_gates_share_the_channels_evenly() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads=3: must divide hidden_size=32"):
        HybridConfig(**{**BASE, "num_attention_heads": 3, "head_dim": 8, "gate_granularity": "head"})
    counts = {name: HybridConfig(**{**BASE, "gate_granularity": name}).gates_per_token for name in GRANULARITIES}
    assert counts == {"channel": 32, "head": 4, "token": 1, "layer": 1}


# A value other than the base's for every field, and the config it is flipped in where the base does not read it.
FLIPS = {
    "vocab_size": (67, {}),
    "hidden_size": (64, {}),
    "num_hidden_layers": (3, {}),
    "num_attention_heads": (2, {}),
    "num_key_value_heads": (2, {}),
    "head_dim": (4, {}),
    "sliding_window": (9, {}),
    "global_heads": (3, {}),
    "rope_theta": (50.0, {}),
    "rope_scaling": ("linear", {"rope_factor": 2.0}),
    "rope_factor": (4.0, {"rope_scaling": "ntk"}),
    "max_position_embeddings": (300, {"srte": "learned"}),
    "mamba_d_state": (4, {}),
    "mamba_d_conv": (3, {}),
    "mamba_expand": (1.5, {}),
    "mamba_head_dim": (16, {}),
    "mamba_n_groups": (2, {}),
    "mamba_dt_limit": ((0.1, 0.2), {}),
    "srte": ("low_rank", {}),
    "srte_rank": (3, {"srte": "low_rank"}),
    "srte_shared": (False, {}),
    "gate_rank": (3, {}),
    "gate_granularity": ("head", {}),
    "cross_rank": (3, {}),
    "window_growth": (4, {}),
    "norm_placement": ("pre", {}),
    "norm_eps": (0.1, {}),
    "mlp_type": ("swiglu", {}),
    "intermediate_size": (24, {}),
    "hidden_act": ("relu", {}),
    "layers": ([{"mixers": ["mamba"]}, {}], {}),
    "tie_word_embeddings": (False, {}),
    "block": ("sequential", {"mixers": ["attention"]}),
    "position_encoding": ("alibi", {}),
    "global_position_encoding": ("none", {}),
    "rope_original_length": (8, {"rope_scaling": "yarn", "rope_factor": 4.0}),
    "mamba_type": ("mamba1", {}),
    "mamba_dt_rank": (3, {"mamba_type": "mamba1"}),
    "fusion_rule": ("sum", {}),
    "alignment": (False, {}),
    "norm_type": ("layer", {}),
    "attention_bias": (True, {}),
    "mlp_bias": (True, {}),
    "embedding_norm": (True, {}),
    "num_experts": (3, {}),
    "experts_per_token": (2, {"num_experts": 3}),
    "parallel_norms": (2, {"block": "parallel", "mixers": ["attention"], "norm_placement": "pre"}),
    "mixers": (["attention"], {}),
}
ELSEWHERE = {  # and the test that shows their effect
    "mamba_chunk_size": "changes the order of the work, not the result: tests/models/test_training.py",
    "drop_branch_prob": "tests/models/test_training.py",
    "checkpointing": "tests/models/columns_use.py and test_training.py",
    "initializer_range": "tests/models/test_training.py",
    "use_cache": "tests/models/test_generation.py",
    "pad_token_id": "tests/models/test_generation.py",
    "bos_token_id": "tests/models/test_generation.py",
    "eos_token_id": "tests/models/test_generation.py",
}


def fingerprint(settings: dict) -> tuple:
    """Shapes of all weights, and the logits with weights drawn by name."""
    model = HybridLanguageModel(HybridConfig(**settings)).eval()
    draw_weights(model)
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    with torch.no_grad():
        return shapes, model(tokens(1, 40)).logits


def test_every_setting_is_accounted_for() -> None:
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = {name for name in HybridConfig.__annotations__ if name in {field.name for field in fields(HybridConfig)}}
    assert own - inherited - set(FLIPS) - set(ELSEWHERE) == set()


@pytest.mark.parametrize("name", FLIPS)
def test_every_setting_changes_something(name: str) -> None:
    value, context = FLIPS[name]
    base = {**BASE, **context}
    shapes, logits = fingerprint(base)
    other_shapes, other = fingerprint({**base, name: value})
    assert shapes != other_shapes or not torch.equal(logits, other)


BLOCKS_OF = {  # by the first word of a preset's name; the others are transformers
    "fusiontree": ("hybrid", ("mamba", "attention")),
    "mamba": ("sequential", ("mamba",)),
    "mamba2": ("sequential", ("mamba",)),
    "hymba": ("sequential", ("mamba", "attention")),
    "falcon": ("parallel", ("attention",)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = preset(name, vocab_size=61, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    blocks = {(spec.block, spec.mixers) for spec in config.layer_specs}
    assert len(config.layers) == 3
    kind = "hymba" if name == "falcon_h1_like" else name.partition("_")[0]
    assert blocks == {BLOCKS_OF.get(kind, ("sequential", ("attention",)))}
    model = HybridLanguageModel(config)
    assert model(tokens(1, 7)).logits.shape == (1, 7, 61)
    names = [n for n, _ in model.named_parameters()]
    assert any("mlp" in n for n in names) == (name not in ("mamba", "mamba2"))
    assert any("srte" in n for n in names) == name.startswith("fusiontree")


def test_preset_details() -> None:
    llama = preset("llama", hidden_size=512)
    assert llama.mlp_type == "swiglu" and llama.intermediate_size == 1368 and llama.layers[0]["sliding_window"] is None
    assert preset("llama", intermediate_size=100).intermediate_size == 100
    mistral = preset("llama", sliding_window=128)
    assert {(s.sliding_window, s.global_heads) for s in mistral.layer_specs} == {(128, 0)}
    assert preset("fusiontree").to_dict() == HybridConfig().to_dict()
    assert preset("mamba2").mlp_type == "none"


def test_what_makes_each_preset_itself() -> None:
    def has(name: str, **settings: object) -> bool:
        config = preset(name, hidden_size=64, num_attention_heads=8, num_hidden_layers=5)
        return all(getattr(config, key) == value for key, value in settings.items())

    assert has("gpt2", position_encoding="learned", norm_type="layer", attention_bias=True, intermediate_size=256)
    assert has("bloom", position_encoding="alibi", embedding_norm=True, mlp_bias=True, norm_type="layer")
    assert has("falcon", block="parallel", num_key_value_heads=1, mlp_bias=False, norm_type="layer", mlp_type="mlp")
    assert has("mistral", sliding_window=4096, num_key_value_heads=2, mlp_type="swiglu", norm_type="rms")
    assert has("mamba", mamba_type="mamba1", mamba_d_state=16, mlp_type="none")
    assert has("falcon_h1_like", fusion_rule="sum") and has("hymba_like", fusion_rule="mean")
    hymba = preset("hymba_like", num_hidden_layers=5)
    assert [layer["sliding_window"] for layer in hymba.layers] == [None, 1024, None, 1024, None]
    assert has("fusiontree_v2", window_growth=4) and has("fusiontree_v3", cross_rank=4)
    assert has("fusiontree_v4", gate_granularity="head")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block": "parallel", "mixers": ["attention"], "mlp_type": "none"}, "mlp_type='none'"),
        ({"block": "parallel", "mixers": ["attention"], "parallel_norms": 2}, "parallel_norms=2"),
        ({"num_experts": 2, "mlp_type": "none"}, "num_experts=2"),
        ({"fusion_rule": "sum", "mlp_type": "none"}, "alignment=True: without a gate and an MLP"),
    ],
)
def test_settings_that_need_each_other(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HybridConfig(**{**BASE, **settings})


def test_an_odd_head_needs_no_turning() -> None:
    assert HybridConfig(**{**BASE, "head_dim": 7, "position_encoding": "alibi"})
    with pytest.raises(ConfigError, match="head_dim=7: must be even"):
        HybridConfig(**{**BASE, "head_dim": 7, "position_encoding": "alibi", "global_position_encoding": "rope"})


def test_unknown_presets_and_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"preset 'gpt3' does not exist; there are fusiontree, .*llama, "):
        preset("gpt3")
    with pytest.raises(ConfigError, match="unknown setting 'hiden_size'; did you mean 'hidden_size'"):
        preset("llama", hiden_size=3)
    with pytest.raises(ConfigError, match="hidden_size='x'"):
        preset("llama", hidden_size="x")
    with pytest.raises(ConfigError, match="num_hidden_layers=None"):
        preset("mamba2", num_hidden_layers=None)
