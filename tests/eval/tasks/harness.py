"""lm-evaluation-harness's own model class, with or without the package accelerate."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# What lm_eval.models.huggingface imports of accelerate, and uses only for models that it loads and places itself.
NAMES = ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size")


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("accelerate is not installed and was needed: a model object is given, so it must not be")


def hflm() -> Any:
    """HFLM, for model objects.

    It imports accelerate at the top of its file but, given a model object, calls nothing of it. Where accelerate is not
    installed (it makes every `import transformers` import deepspeed too) the four names stand in for it during that
    import; whoever calls one of them fails.
    """
    stand_ins = {} if importlib.util.find_spec("accelerate") else _stand_ins()
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("lm_eval.models.huggingface").HFLM
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _stand_ins() -> dict[str, ModuleType]:
    package, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
    for name in NAMES:
        setattr(package, name, _never)
    utils.get_max_memory = _never
    stand_ins = {module.__name__: module for module in (package, utils)}
    for name, module in stand_ins.items():
        module.__spec__ = ModuleSpec(name, None)
    return stand_ins
