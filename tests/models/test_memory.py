"""Long inputs: memory grows with the length, not with its square."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusiontree.models import HybridCache
from tests.models.kinds import build, tokens

PREFILL = """
import json, resource, sys, time
import torch
from tests.models.kinds import build, tokens
model = build(sys.argv[1], sliding_window=64, mamba_chunk_size=64, max_position_embeddings=32768)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.no_grad():
    model(tokens(1, 500))
    before, begin = peak(), time.perf_counter()
    out = model(tokens(1, 20_000), logits_to_keep=1)
print(json.dumps({"mb": peak() - before, "seconds": time.perf_counter() - begin}))
"""


@pytest.mark.parametrize("kind", ["local_only", "post"])
def test_20_000_tokens_through_prefill(kind: str) -> None:
    """L×L in fp32 would be 1,600 MB for one head; hidden states of all layers and branches are some 100 MB."""
    done = subprocess.run([sys.executable, "-c", PREFILL, kind], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mb"] < 400 and found["seconds"] < 40, found


class Largest(TorchDispatchMode):
    """The most elements any result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("kind", ["local_only", "mistral", "mamba2", "groups"])
def test_nothing_of_length_squared_is_built(kind: str) -> None:
    """Forward, backward and cached chunks, plain, padded and packed, with no head that sees everything."""
    length = 2048
    model = build(kind, sliding_window=16, global_heads=0)
    ids, mask = tokens(1, length), torch.ones(1, length, dtype=torch.long)
    mask[0, :100] = 0
    positions = torch.arange(length)[None] % 700
    cache = HybridCache(model.config)
    with Largest() as largest:
        for named in ({}, {"attention_mask": mask}, {"position_ids": positions}):
            model(ids, use_cache=False, **named).logits.sum().backward()
        with torch.no_grad():
            for chunk in ids.split([1000, 1, 1047], dim=1):
                model(chunk, past_key_values=cache)
    assert largest.elements < length * length / 4


def test_decoding_does_not_slow_down_with_windows() -> None:
    """Windows and states are of one size: the 1,200th token costs what the 200th did."""
    model = build("local_only", sliding_window=64)
    with torch.no_grad():
        cache = HybridCache(model.config)
        times, ids = [], tokens(1, 1)
        for _ in range(1200):
            begin = time.perf_counter()
            model(ids, past_key_values=cache)
            times.append(time.perf_counter() - begin)
    early, late = (sorted(part)[len(part) // 2] for part in (times[200:400], times[-200:]))
    assert late < 2 * early
    assert cache.layers[0].local.store.shape[3] < 64 + 600
