"""Files that run code where they are read as pickles, as templates or as Python: all they do is write a canary file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Payload:
    """Unpickled, it writes the canary."""

    def __init__(self, canary: Path) -> None:
        self.code = code(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').write('ran')"


def write_pickle(path: Path, canary: Path) -> None:
    """A plain pickle, as `.metadata` of torch's distributed checkpoints is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"state": Payload(canary)}))


def write_torch(path: Path, canary: Path) -> None:
    """What torch.save writes: weights, training arguments, optimizer and random state of many other programs."""
    torch.save({"weight": torch.zeros(2), "state": Payload(canary)}, path)


def write_numpy(path: Path, canary: Path) -> None:
    """An array of objects."""
    np.save(path, np.array([Payload(canary)], dtype=object), allow_pickle=True)


def write_module(path: Path, canary: Path) -> None:
    """Python beside a model, with every class that its config could name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("Config", "Model", "Tokenizer")
    path.write_text(code(canary) + "\n" + "".join(f"class {name}: pass\n" for name in names), encoding="utf-8")


AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}
PICKLES = {
    "pytorch_model.bin": write_torch,
    "model.pt": write_torch,
    "training_args.bin": write_torch,
    "optimizer.pt": write_torch,
    "scheduler.pt": write_torch,
    "rng_state.pth": write_torch,
    ".metadata": write_pickle,
    "__0_0.distcp": write_pickle,
    "latest": write_pickle,
    "global_step8/mp_rank_00_model_states.pt": write_pickle,
    "tokenizer.pkl": write_pickle,
}
MODULES = ("evil.py", "modeling_fusiontree.py", "custom_generate/generate.py", "sitecustomize.py")


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def plant_everything(folder: Path, canary: Path) -> None:
    """Everything at once beside good files."""
    for name, write in PICKLES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, canary)
    for name in MODULES:
        write_module(folder / name, canary)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        edit_json(folder / name, auto_map=AUTO_MAP)


TEMPLATES = {
    "globals of a global": "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "builtins": "{{ lipsum.__globals__['__builtins__']['exec'](\"open('CANARY', 'w')\") }}",
    "through a filter": "{{ ''|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ ''.__class__.__mro__ }}",
    "changing the messages": "{{ messages.append(messages) }}",
    "no end": "{% for a in range(10 ** 12) %}{{ a }}{% endfor %}",
    "not a template": "{% for %}",
    "an error of its own": "{{ raise_exception('stop') }}",
}
