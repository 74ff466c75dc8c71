"""What a save does to the disk, as a list of moments, and a way to do something just before one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

Moment = tuple[str, str]  # what is about to be done, and to which file of the checkpoint


class Watch:
    """Sees every file opened for writing, synced or renamed in the checkpoint of one step, before it is done.

    It cannot be taken off again (audit hooks never are), so it belongs in a process of its own.
    """

    def __init__(self, step: int, act: Callable[[int, Moment], None]) -> None:
        self.names = (f"step-{step:08d}.tmp", f"step-{step:08d}")
        self.act = act
        self.count = 0
        self.moving = False
        self._wrap(os, "fsync", lambda descriptor: self._see("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        self._wrap(safetensors.torch, "serialize_file", lambda tensors, name, **_: self._see("write", name))
        sys.addaudithook(self._heard)

    def _wrap(self, module: Any, name: str, see: Callable[..., None]) -> None:
        original = getattr(module, name)

        def seen(*arguments: Any, **options: Any) -> Any:
            see(*arguments, **options)
            return original(*arguments, **options)

        setattr(module, name, seen)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+"):
            self._see("write", arguments[0])
        elif event == "os.rename":
            self._see("rename", arguments[0])

    def _see(self, kind: str, path: Any) -> None:
        place = Path(os.fsdecode(path))
        inside = [name for name in self.names if name in place.parts]
        if inside:
            self.moving = self.moving or kind == "rename"
            name = place.parts[place.parts.index(inside[0]) + 1 :]
            self._tell((kind, "/".join(name) or "folder"))
        elif self.moving and kind == "sync" and place.name == "checkpoints":
            self.moving = False  # what follows belongs to another save
            self._tell((kind, "checkpoints"))

    def _tell(self, moment: Moment) -> None:
        self.act(self.count, moment)
        self.count += 1


def record(path: Path, step: int) -> None:
    """Write down the moments of a save, one per line."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(number: int, moment: Moment) -> None:
        os.write(descriptor, f"{' '.join(moment)}\n".encode())

    Watch(step, write)


def die(step: int, number: int) -> None:
    """End the process before a moment, as a kill would: nothing is cleaned up."""

    def exit_now(seen: int, moment: Moment) -> None:
        if seen == number:
            os._exit(9)

    Watch(step, exit_now)


def signal_self(step: int, moment: Moment, signals: Sequence[int]) -> None:
    """Get these signals before a moment."""

    def send(number: int, seen: Moment) -> None:
        for signal in signals if seen == moment else ():
            os.kill(os.getpid(), signal)

    Watch(step, send)
