"""By how much memory grows at most while something runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(device: torch.device, work: Callable[[], object]) -> int | None:
    """Bytes that `work` held at most beyond what was held before; None where nobody counts them.

    What the garbage collector has not freed yet counts as held before. On a GPU torch's allocator counts, on a CPU
    under Linux the operating system does, for the whole process.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not CLEAR.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # free pages kept by the C library would be taken unseen
    if trim is not None:
        trim(0)
    before = _resident("VmRSS")
    CLEAR.write_text("5", encoding="ascii")  # lets VmHWM start again from the present size
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
