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
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime must be loaded first: the kernels share its threads)

_SOURCE = Path(__file__).with_name("gemv.c")
_FLAGS = ["-O3", "-march=native", "-fPIC", "-fopenmp"]
_log = logging.getLogger("fusiontree.native")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had (said once, on the log)."""
    if os.environ.get("FUSIONTREE_NATIVE", "1") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("no native kernels, torch's own products serve: %s", error)
        return None
    for name in ("gemv_bf16", "gemv_f32"):
        function = getattr(loaded, name)
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3
        function.restype = None
    return loaded


def _built() -> Path:
    """Path of the shared object, compiled now if this source has not been on this processor."""
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise FileNotFoundError("no C compiler (gcc) found")
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fusiontree"
    target = folder / f"kernels-{_key()}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _compile(compiler, Path(work))
            os.replace(Path(work) / "kernels.so", target)
    return target


def _compile(compiler: str, work: Path) -> None:
    # Linked without -fopenmp on purpose: the OpenMP symbols come from the runtime that torch has loaded.
    steps = [
        [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(work / "kernels.o")],
        [compiler, "-shared", "-o", str(work / "kernels.so"), str(work / "kernels.o")],
    ]
    for step in steps:
        subprocess.run(step, check=True, capture_output=True, timeout=120)


def _key() -> str:
    cpu = Path("/proc/cpuinfo")
    flags = next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "") if cpu.exists() else ""
    parts = [_SOURCE.read_text(encoding="utf-8"), " ".join(_FLAGS), platform.machine(), flags]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
