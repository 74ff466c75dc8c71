"""The C kernels against torch's ops, over odd sizes and layouts; and where they must not, or cannot, be used."""

import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops import (
    MambaSizes,
    MambaWeights,
    linear,
    mamba_step,
    mamba_step_reference,
    native,
    rms_norm,
    rms_norm_reference,
)
from tests.models.kinds import assert_same

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}

needs_kernels = pytest.mark.skipif(not native._kernels(), reason="no C compiler here")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def mamba_case(rows: int, groups: int, width: int, dtype: torch.dtype) -> tuple:
    heads, head_dim, state = 2 * groups, 5, 7
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    weights = MambaWeights(
        torch.randn(channels, width).to(dtype),
        torch.randn(channels).to(dtype),
        torch.randn(heads),
        torch.randn(heads),
        torch.randn(heads),
        torch.randn(inner).to(dtype),
    )
    projected = torch.randn(rows, inner + channels + heads).to(dtype)
    # As after a prefill: a view of (rows, time, channels).
    conv_state = torch.randn(rows, width - 1, channels).to(dtype).transpose(1, 2)
    sizes = MambaSizes(heads, head_dim, state, groups, (0.01, 2.0), 1e-5)
    return projected, conv_state, torch.randn(rows, heads, head_dim, state), weights, sizes


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, 10))
def test_products_and_norms(rows: int, dtype: torch.dtype) -> None:
    for out, size in itertools.product((1, 3, 64), (1, 7, 33, 512)):
        x, weight = torch.randn(rows, 1, size).to(dtype), torch.randn(out, size).to(dtype)
        want = F.linear(x.double(), weight.double())
        assert linear(x, weight).dtype == dtype
        assert_same(linear(x, weight), want, TOLERANCE[dtype])
        assert_same(linear(x, weight.t().contiguous().t()), want, TOLERANCE[dtype])  # a weight that is not contiguous
        wide = torch.randn(rows, 1, 2 * size).to(dtype)[..., ::2]  # an input that is not
        assert_same(linear(wide, weight), F.linear(wide.double(), weight.double()), TOLERANCE[dtype])
        scale = torch.randn(2 * size).to(dtype)[::2]
        assert_same(rms_norm(wide, scale, 1e-5), rms_norm_reference(wide, scale, 1e-5), TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "width"), list(itertools.product((1, 3), (1, 2, 4))))
def test_the_mamba_step(groups: int, width: int, dtype: torch.dtype) -> None:
    for rows in (1, 3, 8, 9):
        case = mamba_case(rows, groups, width, dtype)
        for got, want in zip(mamba_step(*case), mamba_step_reference(*case), strict=True):
            assert got.dtype == want.dtype
            assert_same(got, want, TOLERANCE[dtype])


@needs_kernels
def test_layouts_and_default_dtypes_do_not_matter() -> None:
    projected, conv, ssm, weights, sizes = mamba_case(2, 2, 4, torch.float32)
    want = mamba_step_reference(projected, conv, ssm, weights, sizes)
    strided = MambaWeights(*(torch.stack([t, t], dim=-1)[..., 0] for t in vars(weights).values()))
    torch.set_default_dtype(torch.bfloat16)  # what the kernel works in must not shrink with it
    try:
        for held in (weights, strided):
            for got, expected in zip(mamba_step(projected, conv, ssm, held, sizes), want, strict=True):
                assert_same(got, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_wrong_sizes_never_reach_a_kernel() -> None:
    """Kernels read bare memory by the sizes they are told; whatever does not fit is for torch to refuse."""
    with pytest.raises(RuntimeError):
        linear(torch.randn(1, 8), torch.randn(3, 4))
    with pytest.raises(RuntimeError):
        rms_norm(torch.randn(1, 8), torch.randn(4), 1e-5)
    projected, conv, ssm, weights, sizes = mamba_case(2, 1, 4, torch.float32)
    for wrong in ((projected[:1], conv, ssm), (projected[:, :-1], conv, ssm), (projected, conv[:, :-1], ssm)):
        with pytest.raises(RuntimeError):
            mamba_step(*wrong, weights, sizes)
    with pytest.raises(RuntimeError):
        mamba_step(projected, conv, ssm[:, :, :, :-1], weights, sizes)
    for field in fields(weights):
        absent = replace(weights, **{field.name: getattr(weights, field.name)[:0]})  # as an engine leaves a sharded one
        with pytest.raises(RuntimeError):
            mamba_step(projected, conv, ssm, absent, sizes)
    coarse = mamba_step(projected, conv, ssm.half(), weights, sizes)  # not the fp32 that the kernel reads
    want = mamba_step_reference(projected, conv, ssm.half(), weights, sizes)
    assert all(torch.equal(got, expected) for got, expected in zip(coarse, want, strict=True))


def test_who_must_not_have_a_kernel() -> None:
    x = torch.randn(1, 4)

    def has(*tensors: Tensor, rows: int = 1) -> bool:
        return native.kernel("gemv", rows, *tensors) is not None

    class Odd(Tensor):
        pass

    assert has(x, torch.nn.Parameter(x)) == bool(native._kernels())
    assert not has(x, x.to("meta")) and not has(x, x.half()) and not has(x.half()) and not has(x, x.as_subclass(Odd))
    assert not has(x, rows=9)
    with torch.enable_grad():
        assert not has(x)
    with torch.autocast("cpu"):
        assert not has(x)
    traced = torch.jit.trace(lambda t: linear(t, torch.ones(2, 4)), x, check_trace=False)
    assert_same(traced(x + 1), (x + 1).sum().expand(1, 2))


@needs_kernels
def test_threads_share_the_kernels() -> None:
    x, weight = torch.randn(2, 300), torch.randn(400, 300)
    want, wrong = F.linear(x, weight), []

    def work() -> None:
        with torch.no_grad():
            wrong.extend(i for i in range(50) if not torch.allclose(linear(x, weight), want, atol=1e-4))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _forked(queue) -> None:
    with torch.no_grad():
        queue.put(linear(torch.ones(1, 300), torch.ones(400, 300)).sum().item())


@needs_kernels
def test_a_fork_may_use_them() -> None:
    """As a loader's worker would, after its parent has."""
    linear(torch.ones(1, 300), torch.ones(400, 300))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_forked, args=(queue,))
    worker.start()
    assert queue.get(timeout=60) == 400 * 300
    worker.join()


SCRIPT = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from fusiontree.ops import linear, native
with torch.no_grad():
    assert linear(torch.ones(1, 6), torch.ones(5, 6)).tolist() == [[6.0] * 5]
print(len(native._kernels()))
"""


def start(home: Path, **environment: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "FUSIONTREE_NATIVE", "CC")}
    settings = {**kept, "XDG_CACHE_HOME": str(home), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    return out.strip(), error


@needs_kernels
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]
    assert [finish(process)[0] for process in both] == ["6", "6"]
    assert len(list((tmp_path / "fusiontree").iterdir())) == 1, "nothing but the finished library is left"


def test_without_kernels_torch_serves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where the cache folder should be")
    (tmp_path / "broken").mkdir()
    compiler = tmp_path / "broken" / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    runs = {
        "switched off": start(tmp_path, FUSIONTREE_NATIVE="0"),
        "no compiler": start(tmp_path, CC=str(tmp_path / "no-such-compiler")),
        "a compiler that fails": start(tmp_path, CC=str(compiler)),
        "no folder to write to": start(tmp_path / "file"),
    }
    for name, process in runs.items():
        out, log = finish(process)
        assert out == "0", name
        assert ("no native kernels" in log) == (name != "switched off"), log


@needs_kernels
def test_a_compiler_may_come_with_arguments(tmp_path: Path) -> None:
    assert finish(start(tmp_path, CC="gcc -Wall"))[0] == "6"
