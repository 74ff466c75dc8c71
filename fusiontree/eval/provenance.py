"""Where a number comes from: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]  # of the source tree, when it is one
PACKAGES = ("fusiontree", "torch", "transformers", "tokenizers")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


def provenance(device: torch.device) -> dict[str, Any]:
    """Date, machine and versions of a measurement on `device`, as JSON."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What is computed on: processor, memory, threads, device."""
    cpu = _cpu()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _cpu() -> dict[str, str]:
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return {}
    pairs = (line.partition(":") for line in information.read_text(encoding="utf-8").splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def commit(*also: str) -> str | None:
    """The commit of the source tree this package runs from, "+ changes" when it or `also` differ; None: installed."""
    if not (ROOT / ".git").exists():
        return None
    head = _git("rev-parse", "--short=12", "HEAD")
    return f"{head} + changes" if head and _git("status", "--porcelain", "--", "fusiontree", *also) else head


def _git(*command: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
