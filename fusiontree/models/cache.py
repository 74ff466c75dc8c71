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
from fusiontree.models.segments import Progress

StatesAfter = Callable[[int], tuple[Tensor | None, Tensor | None]]  # n → conv and SSM state after n tokens

_ROOM = 256  # spare slots of a key/value buffer, so that decoding appends in place

_SIZES = (  # of a config, that decide the shape and meaning of a cache
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "mamba_expand", "mamba_head_dim", "mamba_n_groups", "mamba_d_state", "mamba_d_conv",
)  # fmt: skip


def insert_past(past: Tensor, new: Tensor, pads: Tensor | None) -> Tensor:
    """Join along dimension 1 with each row's past right before its first real token: [padding | past | tokens]."""
    joined = torch.cat([past.to(new.dtype), new], dim=1)
    if pads is None:
        return joined
    size = past.shape[1]
    slot = torch.arange(joined.shape[1], device=new.device)[None]
    pads = pads[:, None]
    source = torch.where(slot < pads, slot + size, torch.where(slot < pads + size, slot - pads, slot))
    return joined.gather(1, source.view(*source.shape, *[1] * (joined.ndim - 2)).expand_as(joined))


def _shapes(config: HybridConfig, batch: int, seen: int) -> dict[str, tuple[int | None, ...]]:
    """Shape of each part of a layer after `seen` tokens; None where it may differ between layers."""
    channels = config.mamba_inner_size + 2 * config.mamba_n_groups * config.mamba_d_state
    rows: tuple[int | None, ...] = (batch,)
    return {
        "conv_state": (batch, channels, config.mamba_d_conv - 1),
        "ssm_state": (batch, config.mamba_num_heads, config.mamba_head_dim, config.mamba_d_state),
        "local": (2, batch, None, None, config.head_dim),
        "global": (2, batch, None, seen, config.head_dim),
        "age": rows,
        "position": rows,
        "seq_idx": rows,
    }


class KVBuffer:
    """Keys and values in order of time. With a window it shows the last W - 1 before the new ones; without, all."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.store: Tensor | None = None  # (2, B, K, capacity, P)
        self.begin = 0
        self.end = 0
        self.recorded = 0  # last tokens that may yet be taken back: the window before them is kept too

    def extend(self, k: Tensor, v: Tensor, pads: Tensor | None, keep_all: bool) -> tuple[Tensor, Tensor]:
        """Add k and v (B, K, L, P); returns what the new queries may need, (B, K, S, P), the new ones last."""
        if k.shape[2] == 1 and pads is None and not torch.is_grad_enabled() and self._append(k, v):
            self.recorded = self.recorded + 1 if keep_all else 0
            begin = self.begin if self.window is None else max(self.begin, self.end - self.window)
            shown = self.store[:, :, :, begin : self.end]  # type: ignore[index]
            return shown[0], shown[1]
        joined = torch.stack([k, v])
        past = self._past()
        if past is not None:
            flat = (t.flatten(0, 1).transpose(1, 2).unflatten(0, (2, -1)) for t in (past, joined))
            rows = [insert_past(p, n, pads) for p, n in zip(*flat, strict=True)]
            joined = torch.stack(rows).transpose(2, 3)
        self.recorded = self.recorded + k.shape[2] if keep_all else 0
        keep = joined.shape[3]
        if self.window is not None:
            keep = min(keep, self.window - 1 + self.recorded)
        self._hold(joined[:, :, :, joined.shape[3] - keep :])
        return joined[0], joined[1]

    def tensors(self) -> Tensor | None:
        """All that is held, (2, B, K, S, P)."""
        return None if self.store is None else self.store[:, :, :, self.begin : self.end]

    def replace(self, tensors: Tensor | None) -> None:
        if tensors is None:
            self.store, self.begin, self.end = None, 0, 0
        else:
            self._hold(tensors)

    def drop_last(self, count: int) -> None:
        self.end -= count

    def fork(self) -> KVBuffer:
        twin = KVBuffer(self.window)
        twin.replace(self.tensors())
        twin.recorded = self.recorded
        return twin

    def _past(self) -> Tensor | None:
        held = self.tensors()
        if held is None or self.window is None:
            return held
        keep = min(held.shape[3], self.window - 1 + self.recorded)
        return held[:, :, :, held.shape[3] - keep :]

    def _append(self, k: Tensor, v: Tensor) -> bool:
        if self.store is None or self.store.dtype != k.dtype:
            return False
        if self.end == self.store.shape[3]:
            self._hold(self._past())  # type: ignore[arg-type]
        self.store[0, :, :, self.end] = k[:, :, 0]
        self.store[1, :, :, self.end] = v[:, :, 0]
        self.end += 1
        return True

    def _hold(self, tensors: Tensor) -> None:
        """Own a copy with room to grow; under grad the tensors themselves, so that gradients flow through the cache."""
        self.begin, self.end = 0, tensors.shape[3]
        if tensors.requires_grad:
            self.store = tensors
            return
        room = max(_ROOM, self.end // 4) if self.window is None else max(_ROOM, self.window)
        with torch.inference_mode(False):  # written in place later, perhaps after inference mode has ended
            self.store = tensors.new_empty(*tensors.shape[:3], self.end + room, tensors.shape[4])
        self.store[:, :, :, : self.end] = tensors


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
        self.ssm_state: Tensor | None = None  # (B, H, P, N) fp32
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
