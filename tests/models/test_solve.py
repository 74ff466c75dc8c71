"""Sizes solved for: how close they come, what stays fixed, what cannot be had."""

import pytest

from fusiontree.errors import ConfigError
from fusiontree.models import account, solve
from fusiontree.models.presets import PRESETS

SMALL = {"vocab_size": 4096}


@pytest.mark.parametrize("name", PRESETS)
def test_ten_million_parameters(name: str) -> None:
    solved = solve(name, params=10e6, **SMALL)
    config = solved.config
    assert account(config).total_parameters == solved.got and abs(solved.off) < 0.02
    assert 24 <= config.hidden_size / config.num_hidden_layers <= 180
    assert config.vocab_size == 4096 and config.hidden_size % config.num_attention_heads == 0


@pytest.mark.parametrize("asked", [3e5, 2.5e6, 124e6, 7e9])
def test_any_size(asked: float) -> None:
    vocabulary = {"vocab_size": 256 if asked < 1e6 else 32000 if asked > 1e8 else 4096}
    for name in ("fusiontree", "llama", "mamba2"):
        assert abs(solve(name, params=asked, **vocabulary).off) < 0.03


def test_flops_can_be_asked_for() -> None:
    solved = solve("llama", flops=50e6, length=256, **SMALL)
    assert account(solved.config, 256).flops_per_token == solved.got == pytest.approx(50e6, rel=0.02)
    assert "FLOPs per token" in str(solved) and "from the 50,000,000 asked" in str(solved)


def test_what_is_fixed_stays() -> None:
    deep = solve("llama", params=10e6, num_hidden_layers=12, **SMALL)
    assert deep.config.num_hidden_layers == 12 and abs(deep.off) < 0.01
    wide = solve("llama", params=10e6, hidden_size=128, **SMALL)
    assert wide.config.hidden_size == 128 and abs(wide.off) < 0.02
    heads = solve("fusiontree", params=10e6, num_attention_heads=6, gate_rank=16, **SMALL)
    assert heads.config.num_attention_heads == 6 and heads.config.gate_rank == 16 and abs(heads.off) < 0.02
    inner = solve("llama", params=10e6, intermediate_size=512, **SMALL)
    assert inner.config.intermediate_size == 512
    layers = [{"mixers": ["attention"]}, {}, {"mixers": ["mamba"]}]
    assert len(solve("fusiontree", params=10e6, layers=layers, **SMALL).config.layers) == 3


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("llama", {"params": 1e5}, r"no sizes come within 5% of 100,000 parameters; the nearest has .* embedding"),
        ("llama", {"params": 1e9, "hidden_size": 64, "num_hidden_layers": 2}, "hidden_size, num_hidden_layers fixed"),
        ("llama", {}, "give params or flops"),
        ("llama", {"params": 1e6, "flops": 1e6}, "give params or flops"),
        ("llama", {"params": -1}, "must be a positive number"),
        ("x", {"params": 1e6}, "preset 'x' does not exist; there are fusiontree"),
        ("llama", {"params": 1e7, "heads": 3}, "unknown setting 'heads'"),
        ("llama", {"params": 1e7, "hidden_size": "x"}, "hidden_size='x'"),
        ("llama", {"params": 1e7, "num_attention_heads": 7, "num_key_value_heads": 2}, "num_key_value_heads=2"),
    ],
)
def test_what_cannot_be_solved_is_refused(name: str, settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        solve(name, **settings)
    assert "\n" not in str(error.value)
