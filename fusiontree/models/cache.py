"""The generation cache: convolution and SSM states, a sliding run of keys for local heads, a growing one for global.

`HybridCacheLayer` holds all parts of one layer, so that fork, rollback, reorder, save and load move every part or none.
Shapes: B batch, K key/value heads, S keys, P head size, W window, D channels of the convolution, N state.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fusiontree.errors import CheckpointError
from fusiontree.models.config import HybridConfig
from fusiontree.models.kv_buffer import KVBuffer
from fusiontree.models.segments import Progress

StatesAfter = Callable[[int], tuple[Tensor | None, Tensor | None]]  # n → conv and SSM state after n tokens

_SIZES = (  # of a config, that decide the shape and meaning of a cache
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "position_encoding", "global_position_encoding", "mamba_type", "mamba_expand", "mamba_head_dim", "mamba_n_groups",
    "mamba_d_state", "mamba_d_conv",
)  # fmt: skip


def _shapes(config: HybridConfig, batch: int, seen: int) -> dict[str, tuple[int | None, ...]]:
    """Shape of each part of a layer after `seen` tokens; None where it may differ between layers."""
    rows: tuple[int | None, ...] = (batch,)
    return {
        "conv_state": (batch, config.mamba_channels, config.mamba_d_conv - 1),
        "ssm_state": _SSM_SHAPES[config.mamba_type](config, batch),
        "local": (2, batch, None, None, config.head_dim),
        "global": (2, batch, None, seen, config.head_dim),
        "age": rows,
        "position": rows,
        "seq_idx": rows,
    }


_SSM_SHAPES: dict[str, Callable[[HybridConfig, int], tuple[int | None, ...]]] = {
    "mamba2": lambda c, batch: (batch, c.mamba_num_heads, c.mamba_head_dim, c.mamba_d_state),
    "mamba1": lambda c, batch: (batch, c.mamba_inner_size, c.mamba_d_state),
}


@dataclass
class Forward:
    """How to go back into one forward pass: what stood after its first n tokens."""

    tokens: int
    progress: Callable[[int], Progress] | None
    states: StatesAfter | None = None


class HybridCacheLayer(CacheLayerMixin):
    """All state of one layer. `progress` is kept in the first layer of a cache and describes the rows of all."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.conv_state: Tensor | None = None  # (B, D, K-1)
        self.ssm_state: Tensor | None = None  # (B, H, P, N), of Mamba-1 (B, E, N), fp32
        self.local = KVBuffer(window)
        self.everywhere = KVBuffer(None)
        self.progress = Progress()
        self.record_past = False
        self.undo: StatesAfter | None = None  # of the last forward, set by the Mamba branch
        self.forwards: list[Forward] = []  # all that can be taken back; the newest one's states are still in `undo`

    # Every part, by name: fork, reorder, save and load are written over this one list.
    def parts(self) -> dict[str, Tensor | None]:
        return {
            "conv_state": self.conv_state,
            "ssm_state": self.ssm_state,
            "local": self.local.tensors(),
            "global": self.everywhere.tensors(),
            "age": self.progress.age,
            "position": self.progress.position,
            "seq_idx": self.progress.seq_idx,
        }

    def set_parts(self, parts: dict[str, Tensor | None], seen: int, dense: bool) -> None:
        self.conv_state, self.ssm_state = parts["conv_state"], parts["ssm_state"]
        self.local.replace(parts["local"])
        self.everywhere.replace(parts["global"])
        self.progress = Progress(seen, parts["age"], parts["position"], parts["seq_idx"], dense)
        self.is_initialized = any(t is not None for t in parts.values())
        self._forget_undo()

    def fork(self) -> HybridCacheLayer:
        """An independent copy: neither sees what the other does later."""
        twin = copy.copy(self)
        twin.local, twin.everywhere = self.local.fork(), self.everywhere.fork()
        twin.progress, twin.forwards = copy.copy(self.progress), [copy.copy(forward) for forward in self.forwards]
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        batch_dim = {"local": 1, "global": 1}
        moved = {
            name: None if t is None else t.index_select(batch_dim.get(name, 0), indices.to(t.device))
            for name, t in self.parts().items()
        }
        self.set_parts(moved, self.progress.seen, self.progress.dense)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self._rows()
        if rows is not None:
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        self.set_parts(dict.fromkeys(self.parts()), 0, True)

    def activate_past_recording(self) -> None:
        """From now on tokens can be taken back with `crop`, which ends the record of those before it."""
        self.record_past = True

    def begin_forward(self, tokens: int, progress_after: Callable[[int], Progress] | None) -> None:
        """Called before the mixers run; what the Mamba branch left in `undo` belongs to the forward before."""
        self.is_initialized = True
        if not self.record_past:
            self._forget_undo()
            return
        if self.forwards:
            self.forwards[-1].states = self.undo
        self.undo = None
        self.forwards.append(Forward(tokens, progress_after))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -n tokens, all of them recorded since the last `crop`; 0 only ends the record.

        n is negative, as in transformers, where a positive number once was the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to take back as a negative number")
        count = -tokens_to_remove
        recorded = sum(forward.tokens for forward in self.forwards)
        if count > recorded:
            raise ValueError(
                f"cannot take back {count} tokens: {recorded} are recorded "
                "(since activate_past_recording() on the cache, or since the last crop)"
            )
        if count:
            self.forwards[-1].states = self.undo
            self._go_back(count)
        self._forget_undo()

    def _go_back(self, count: int) -> None:
        at, kept = len(self.forwards), -count
        while kept < 0:
            at -= 1
            kept += self.forwards[at].tokens
        forward = self.forwards[at]
        if forward.progress is not None:
            self.progress = forward.progress(kept)  # may refuse, and then nothing has changed yet
        if forward.states is not None:
            self.conv_state, self.ssm_state = forward.states(kept)
        for buffer in (self.local, self.everywhere):
            if buffer.store is not None:
                buffer.drop_last(count)

    def _forget_undo(self) -> None:
        self.undo, self.forwards = None, []
        self.local.recorded = self.everywhere.recorded = 0

    def _rows(self) -> Tensor | None:
        for name, t in self.parts().items():
            if t is not None:
                return torch.arange(t.shape[1 if name in ("local", "global") else 0], device=t.device)
        return None

    # What transformers' Cache asks of a layer. Mixers write the parts directly, so there is no `update`.
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("HybridCacheLayer is written by FusionTree's mixers, not by update()")

    def get_seq_length(self) -> int:
        return self.progress.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.progress.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.20

    @property
    def batch_size(self) -> int:
        rows = self._rows()
        return -1 if rows is None else len(rows)


class HybridCache(Cache):
    """A cache for `HybridLanguageModel`: `HybridCache(model.config)`, or leave it to `generate`."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(layers=[HybridCacheLayer(spec.sliding_window) for spec in config.layer_specs])
        self.layout = json.dumps({"layers": config.layers, **{name: getattr(config, name) for name in _SIZES}})
        self.config = config

    @property
    def progress(self) -> Progress:
        return self.layers[0].progress

    @property
    def is_initialized(self) -> bool:
        return self.progress.seen > 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.progress.seen

    def advance(self, after: Progress, progress_after: Callable[[int], Progress]) -> None:
        """Note new tokens; `progress_after(n)` tells where the rows stood had only the first n of them come."""
        tokens = after.seen - self.progress.seen
        for i, layer in enumerate(self.layers):
            layer.begin_forward(tokens, progress_after if i == 0 else None)
        self.layers[0].progress = after

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -n tokens, recorded since `activate_past_recording` or the last `crop`; n ≤ 0."""
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def fork(self) -> HybridCache:
        """An independent copy of every part."""
        twin = copy.copy(self)
        twin.layers = [layer.fork() for layer in self.layers]
        return twin

    def state_bytes(self) -> int:
        """Bytes of everything held, without the spare room of the buffers."""
        return sum(t.numel() * t.element_size() for _, t in self._named_parts())

    def save(self, path: str | Path) -> None:
        """Write every part to one safetensors file."""
        meta = {"layout": self.layout, "seen": str(self.progress.seen), "dense": str(int(self.progress.dense))}
        save_file({name: t.detach().contiguous() for name, t in self._named_parts()}, str(path), metadata=meta)

    def load(self, path: str | Path, device: torch.device | str = "cpu") -> HybridCache:
        """Read what `save` wrote for a model of the same layout; returns self."""
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a readable cache file ({error})") from None
        if meta.get("layout") != self.layout:
            raise CheckpointError(f"{path}: this cache belongs to a model with other layers or sizes")
        seen, dense = meta.get("seen", ""), meta.get("dense", "")
        if not seen.isdecimal() or dense not in ("0", "1"):
            raise CheckpointError(f"{path}: not a cache file: seen={seen[:20]!r}, dense={dense[:20]!r}")
        if problem := self._misfit(tensors, int(seen)):
            raise CheckpointError(f"{path}: {problem}")
        for i, layer in enumerate(self.layers):
            layer.set_parts({name: tensors.get(f"{i}.{name}") for name in layer.parts()}, int(seen), dense == "1")
        return self

    def _misfit(self, tensors: dict[str, Tensor], seen: int) -> str | None:
        """What of a file's tensors cannot belong to this cache after `seen` tokens; kernels trust sizes and dtypes."""
        names = {f"{i}.{name}": name for i, layer in enumerate(self.layers) for name in layer.parts()}
        if unknown := sorted(tensors.keys() - names.keys()):
            return f"unknown part {unknown[0][:40]!r}"
        if seen and not {"0.age", "0.position"} <= tensors.keys():
            return "the rows' ages or positions are missing"
        batch = len(tensors["0.age"]) if seen and tensors["0.age"].ndim else 0
        expected = _shapes(self.config, batch, seen)
        for full, t in tensors.items():
            shape, dtype = expected[names[full]], t.dtype
            fits = t.ndim == len(shape) and all(want in (None, size) for want, size in zip(shape, t.shape, strict=True))
            whole, exact = t.ndim == 1, names[full] == "ssm_state"
            allowed = dtype == torch.int64 if whole else dtype == torch.float32 if exact else dtype.is_floating_point
            if not fits or not allowed:
                return f"part {full} cannot be {tuple(t.shape)} of {t.dtype}"
        return None

    def _named_parts(self) -> Iterator[tuple[str, Tensor]]:
        for i, layer in enumerate(self.layers):
            for name, t in layer.parts().items():
                if t is not None:
                    yield f"{i}.{name}", t
