"""Peak memory of a generation, and what it consists of: weights, cache by part, activations.

On a GPU the allocator of torch counts. On a CPU the operating system does: by how much the resident memory of a process
has grown at most, which also sees what kernels allocate past torch. Linux only. The C library keeps freed pages, which
would count as memory in use, or be taken again unseen: it is made to give them back, in a measuring process at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from fusiontree.errors import ConfigError
from fusiontree.eval.loading import load_causal_model
from fusiontree.eval.system.apart import ProcessDiedError, in_fresh_process
from fusiontree.eval.system.holdings import weight_bytes
from fusiontree.eval.system.speed import generate_once, random_prompt

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 128 << 10  # of malloc.h; bytes
WARM_UP = 32  # tokens; enough to load kernels and libraries


class NoRoomError(ConfigError):
    """It does not fit the memory."""


@dataclass(frozen=True)
class MemoryResult:
    """Bytes at the peak of one generation; the parts add up to `peak`. `process`: all of the process, on a CPU."""

    weights: int
    kv: int
    ssm: int
    conv: int
    other: int  # of the cache: positions and the like
    activations: int
    peak: int
    process: int | None = None


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and as what it is loaded."""

    place: str
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False

    def load(self, device: str | torch.device | None) -> Any:
        return load_causal_model(self.place, device=device, dtype=self.dtype, trust_remote_code=self.trust_remote_code)


def measure_memory(model: Any, length: int, new_tokens: int, batch_size: int = 1, *, seed: int = 0) -> MemoryResult:
    """Generate `new_tokens` after `batch_size` random prompts of `length` tokens and see how much memory it takes.

    The weights and the cache at the end are counted from their tensors, activations are what the peak has on top. The
    caller sees to it that nothing else works in this process. NoRoomError when it does not fit.
    """
    device = next(model.parameters()).device
    weights = weight_bytes(model)
    _touch(model)
    with out_of_memory_is_one_line():
        generate_once(model, random_prompt(model, batch_size, min(length, WARM_UP), seed), 2)
    with out_of_memory_is_one_line(), peak_growth(device) as grown:
        cache = generate_once(model, random_prompt(model, batch_size, length, seed), new_tokens).cache
        # Pages of a buffer that nothing was written to are no memory yet, but its bytes count.
        growth = max(grown(), sum(cache.values()))
    process = resident("VmHWM") if device.type == "cpu" else None
    activations = growth - sum(cache.values())
    return MemoryResult(weights, **cache, activations=activations, peak=weights + growth, process=process)


def measure_memory_apart(
    source: Source, length: int, new_tokens: int, batch_size: int, *, threads: int, seed: int = 0
) -> MemoryResult:
    """`measure_memory` on the CPU, in a process that has done nothing else. NoRoomError also when it was killed."""
    try:
        return in_fresh_process(_load_and_measure, source, length, new_tokens, batch_size, threads, seed)
    except ProcessDiedError as error:
        raise NoRoomError(f"out of memory, it seems: {error}") from None


def _load_and_measure(
    source: Source, length: int, new_tokens: int, batch_size: int, threads: int, seed: int
) -> MemoryResult:
    transformers_logging.set_verbosity_error()  # what it has to say the parent has said
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    _give_back_large_blocks_at_once()
    return measure_memory(source.load("cpu"), length, new_tokens, batch_size, seed=seed)


@contextlib.contextmanager
def out_of_memory_is_one_line() -> Iterator[None]:
    """Turn what torch raises when there is no memory left, on any device, into NoRoomError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
        if not known:
            raise
        asked = re.search(r"allocate ([\d.]+ [KMGT]?i?B|\d+ bytes)", text)
        raise NoRoomError("out of memory" + (f": {asked[1]} were asked for at once" if asked else "")) from None


@contextlib.contextmanager
def peak_growth(device: torch.device) -> Iterator[Callable[[], int]]:
    """A function that tells by how many bytes the memory in use has exceeded, at most, what it was at the start.

    On a GPU of what torch has allocated there, on a CPU of the whole process. ConfigError where nobody counts it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        rest = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - rest
        return
    if (why := uncounted(device)) is not None:
        raise ConfigError(why)
    _give_back_free_pages()
    rest = resident("VmRSS")
    reset_peak()
    yield lambda: resident("VmHWM") - rest


def uncounted(device: torch.device) -> str | None:
    """Why nobody counts peak memory on this device; None where it is counted."""
    if device.type == "cuda" or (device.type == "cpu" and CLEAR.exists()):
        return None
    return f"peak memory is not counted on {device.type} here: only on CUDA devices, and on a CPU under Linux"


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes. Linux."""
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise ConfigError(f"{STATUS} has no {field}: peak memory cannot be measured")


def reset_peak() -> None:
    """Let VmHWM start again from the present size."""
    CLEAR.write_text("5", encoding="ascii")


def _give_back_free_pages() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc; others keep little
    if trim is not None:
        trim(0)


def _give_back_large_blocks_at_once() -> None:
    """Otherwise glibc raises its threshold with every large block that is freed, to 32 MB, and keeps what is below."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(M_MMAP_THRESHOLD, LARGE_BLOCK)


def _touch(model: Any) -> None:
    """Read every weight once: from safetensors they are mapped, and come into memory only when they are used."""
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.detach().reshape(-1).view(torch.uint8).max() if tensor.numel() else None
