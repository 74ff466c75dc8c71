"""Small C kernels, compiled on the machine they run on at first use; without a compiler, torch's own ops serve.

`FUSIONTREE_NATIVE=0` switches them off. The build is cached under the user's cache folder, by source and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_FOLDER = Path(__file__).parent
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp"]
_PLAIN = (Tensor, nn.Parameter)  # subclasses (fake, distributed, quantised) may have no memory of their own
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "gemv": [_POINTER] * 3 + [_LONG] * 3,
    "rms_norm": [_POINTER] * 3 + [_LONG] * 2 + [_FLOAT],
    "mamba_step": [_POINTER] * 13 + [_LONG] * 6 + [_FLOAT] * 3,
}
MAX_ROWS = 8  # past this, torch's own products win
_log = logging.getLogger("fusiontree.native")


def kernel(name: str, rows: int, *tensors: Tensor) -> Callable[..., None] | None:
    """The kernel `name` when it can serve: decoding (few rows, no gradient, no autocast) with plain CPU tensors of one
    dtype. Sizes and contiguity are the caller's to check: a kernel takes bare addresses."""
    if rows > MAX_ROWS or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    dtype = tensors[0].dtype
    if any(type(t) not in _PLAIN or t.dtype != dtype or t.device.type != "cpu" for t in tensors):
        return None
    return _kernels().get((name, dtype))


@functools.cache
def _kernels() -> dict[tuple[str, torch.dtype], Callable[..., None]]:
    """The compiled kernels by name and dtype; empty where they cannot be had (said once, on the log)."""
    if os.environ.get("FUSIONTREE_NATIVE", "1") == "0":
        return {}
    try:
        loaded = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        _log.info("no native kernels, torch's own products serve: %s", error)
        return {}
    found = {}
    for name, arguments in _ARGUMENTS.items():
        for dtype, suffix in _SUFFIX.items():
            function = getattr(loaded, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
            found[name, dtype] = function
    return found


def _built() -> Path:
    """Path of the shared object, compiled now if this source has not been on this processor."""
    compiler = shlex.split(os.environ.get("CC") or "gcc")
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"no C compiler ({compiler[0]}) found")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusiontree"
    target = folder / f"kernels-{_key()}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _compile(compiler, Path(work))
            os.replace(Path(work) / "kernels.so", target)
    return target


def _compile(compiler: list[str], work: Path) -> None:
    # Linked without -fopenmp on purpose: the OpenMP symbols come from the runtime that torch has loaded.
    steps = [
        [*compiler, *_FLAGS, "-c", str(_FOLDER / "kernels.c"), "-o", str(work / "kernels.o")],
        [*compiler, "-shared", "-o", str(work / "kernels.so"), str(work / "kernels.o"), "-lm"],
    ]
    for step in steps:
        subprocess.run(step, check=True, capture_output=True, timeout=120)


def _key() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = [(_FOLDER / name).read_text(encoding="utf-8") for name in ("common.h", "kernels.c")]
    parts = [*sources, " ".join(_FLAGS), platform.machine(), flags]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
