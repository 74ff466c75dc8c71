"""The per-layer list of a `HybridConfig`: silent entries filled in from the model-wide settings, wrong ones refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusiontree.errors import ConfigError
from fusiontree.models.config_checks import is_whole

if TYPE_CHECKING:
    from fusiontree.models.config import HybridConfig

MIXERS = ("mamba", "attention")
BLOCKS = ("hybrid", "sequential", "parallel")
_MIXER_CHOICES = (["mamba"], ["attention"], ["attention", "mamba"])


def fill_layers(config: HybridConfig) -> list[dict[str, Any]]:
    """The per-layer list with model-wide settings filled in where an entry is silent."""
    entries = config.layers if config.layers is not None else [{} for _ in range(config.num_hidden_layers)]
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"layers={entries!r}: must be a list with one mapping per layer")
    if len(entries) != config.num_hidden_layers:
        raise ConfigError(f"layers: {len(entries)} entries, but num_hidden_layers={config.num_hidden_layers}")
    filled = []
    for i, entry in enumerate(entries):
        default = _default_layer(config, i)
        unknown = set(entry) - set(default)
        if unknown:
            raise ConfigError(f"layers[{i}]: unknown key {sorted(unknown)[0]!r}; allowed: {', '.join(default)}")
        filled.append(_check_layer({**default, **entry}, i, config.num_attention_heads))
    return filled


def _default_layer(config: HybridConfig, i: int) -> dict[str, Any]:
    return {
        "block": config.block,
        "mixers": config.mixers,
        "sliding_window": _window_at(config, i),
        "global_heads": config.global_heads,
    }


def _window_at(config: HybridConfig, i: int) -> int | None:
    """The pyramid: the window doubles log2(growth) times over the depth, at even distances."""
    window = config.sliding_window
    if window is None or config.window_growth == 1 or not is_whole(window):  # a wrong type is refused with its layer
        return window
    doublings = config.window_growth.bit_length() - 1
    last = config.num_hidden_layers - 1
    return window << (2 * doublings * i + last) // (2 * last)  # doublings · i / last, rounded


def _check_layer(layer: dict[str, Any], i: int, heads: int) -> dict[str, Any]:
    mixers, window, global_heads = layer["mixers"], layer["sliding_window"], layer["global_heads"]
    here = f"layers[{i}]"
    if layer["block"] not in BLOCKS:
        raise ConfigError(f"{here}.block={layer['block']!r}: must be one of {', '.join(BLOCKS)}")
    if not isinstance(mixers, (list, tuple)) or sorted(map(str, mixers)) not in _MIXER_CHOICES:
        raise ConfigError(f"{here}.mixers={mixers!r}: must be a list of mamba, attention or both, each once")
    if window is not None and (not is_whole(window) or window < 1):
        raise ConfigError(
            f"{here}.sliding_window={window!r}: must be a whole number of keys ≥ 1, or null for no window"
        )
    if not is_whole(global_heads) or not 0 <= global_heads <= heads:
        raise ConfigError(f"{here}.global_heads={global_heads!r}: must be between 0 and num_attention_heads={heads}")
    return {**layer, "mixers": sorted(mixers, key=MIXERS.index)}
