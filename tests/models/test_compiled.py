"""torch.compile: each block is one graph, the numbers stay, and batches of known shapes compile nothing anew."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.models import HybridLanguageModel, compile_blocks
from fusiontree.models.block import _program
from tests.models.kinds import KINDS, assert_same, assert_same_gradients, build, gradients, tokens

pytestmark = pytest.mark.slow
LENGTH = 63
PACKED = torch.cat([torch.arange(n) for n in (40, 1, 22)])[None]
PADDED = torch.ones(2, LENGTH, dtype=torch.long)
PADDED[1, :11] = 0
MADE: list[torch.fx.GraphModule] = []  # programs that `counting` was handed, one per compilation


@torch._dynamo.register_backend
def counting(program: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Runs a program as it is."""
    MADE.append(program)
    return program.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No program from before, none for later, torch's own limits after."""
    limits = torch._dynamo.config
    before = limits.recompile_limit, limits.accumulated_recompile_limit
    torch._dynamo.reset()
    MADE.clear()
    yield
    torch._dynamo.reset()
    _program.cache_clear()
    limits.recompile_limit, limits.accumulated_recompile_limit = before


def gentle(kind: str, **overrides: Any) -> HybridLanguageModel:
    """Weights as small as trained ones: the table's would make other rounding larger than what is looked for."""
    model = build(kind, **overrides).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4 if parameter.ndim > 1 else 1.0)
    return model


def step(model: HybridLanguageModel, bf16: bool = False, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss with every gate in it, and the gradients."""
    ids = tokens(2, LENGTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(ids, labels=ids, output_gates=True, skip_logits=True, **inputs)
    loss = out.loss + sum(gate.float().square().mean() for gate in out.gates if gate is not None)
    return loss.detach(), gradients(model, loss)


def recompute(model: HybridLanguageModel, what: str) -> None:
    model.model.gradient_checkpointing = what != "none"
    if what != "none":
        model.config.checkpointing = what


def assert_compiled_is_eager(model: HybridLanguageModel, backend: str, tolerance: float, **how: Any) -> None:
    loss, grads = step(model, **how)
    compile_blocks(model, backend)
    again, compiled = step(model, **how)
    assert_same(again, loss, tolerance)
    if how.get("bf16"):  # rounded at other places
        assert compiled.keys() == grads.keys() and all(g.isfinite().all() for g in compiled.values())
    else:
        assert_same_gradients(compiled, grads, tolerance)


ALIKE = {  # to other kinds, but for sizes, or covered below
    "post", "mqa", "local_only", "window_odd", "attention_kept", "mamba_kept", "mistral", "srte_learned",
    "srte_low_rank", "conv_2", "pyramid", "cross", "cross_pruned", "gate_token", "bloom", "parallel_2", "mamba",
    "hymba",
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - ALIKE))
def test_every_kind_of_block_is_one_graph(kind: str) -> None:
    """torch.compile is told to refuse a second graph; layers that are alike share the first one's."""
    model = gentle(kind)
    recompute(model, "branches")
    assert_compiled_is_eager(model, "counting", 1e-5, position_ids=PACKED)
    assert 1 <= len(MADE) <= len({str(layer) for layer in model.config.layers})


WAYS = [
    *itertools.product((False, True), ("none", "branches"), ("packed",)),
    (False, "branches", "plain"),
    (True, "block", "packed"),
    (True, "branches", "padded"),
]


@pytest.mark.parametrize(("bf16", "checkpointing", "rows"), WAYS)
def test_every_way_of_training_is_one_graph(bf16: bool, checkpointing: str, rows: str) -> None:
    model = gentle("cross")
    recompute(model, checkpointing)
    inputs = {"packed": {"position_ids": PACKED}, "padded": {"attention_mask": PADDED}}.get(rows, {})
    assert_compiled_is_eager(model, "counting", 1e-2 if bf16 else 1e-5, bf16=bf16, **inputs)
    assert len(MADE) == 1


def test_a_layer_without_a_branch_is_one_graph() -> None:
    model = gentle("cross", num_hidden_layers=4)
    with model.branches_removed({1: "mamba", 2: "attention", 3: "mamba"}):
        assert_compiled_is_eager(model, "counting", 1e-5)
    assert len(MADE) == 3


def test_the_whole_model_is_one_graph_where_rows_are_whole() -> None:
    """Packing and padding look at values, once, before the blocks."""
    model = build("post").train()
    ids = tokens(2, LENGTH)
    whole = torch.compile(lambda: model(ids, labels=ids, skip_logits=True).loss, fullgraph=True, backend="counting")
    assert_same(whole(), model(ids, labels=ids).loss)
    assert len(MADE) == 1


def test_forward_and_backward_as_autograd_compiles_them() -> None:
    model = gentle("cross", num_hidden_layers=1)
    recompute(model, "branches")
    assert_compiled_is_eager(model, "aot_eager", 1e-5, position_ids=PACKED)


def test_compiled_code_gives_the_same_numbers() -> None:
    """Of the branch that has most to compile; `benchmarks.compile_speed` does a whole model."""
    model = gentle("mamba2", num_hidden_layers=1)
    assert_compiled_is_eager(model, "inductor", 1e-5, position_ids=PACKED)


def packed_rows(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Position ids (B, L) with three documents in each row, cut anywhere."""
    cuts = torch.randint(1, length, (rows, 2), generator=generator).sort(1).values
    slot = torch.arange(length).expand(rows, length)
    begins = torch.cat([torch.zeros(rows, 1, dtype=torch.long), cuts], dim=1)
    return slot - torch.where(slot[:, :, None] >= begins[:, None], begins[:, None], 0).amax(2)


def test_a_known_shape_compiles_nothing_anew() -> None:
    model, generator = build("post").train(), torch.Generator().manual_seed(0)
    compile_blocks(model, "counting")
    counts = []
    lengths = [64, 64, 64, 96, 72, 65, 88, 100, 81]
    for i, length in enumerate(lengths):
        ids = tokens(2, length, seed=i)
        out = model(
            ids, labels=ids, position_ids=packed_rows(2, length, generator), output_gates=i % 2 == 0, skip_logits=True
        )
        assert (out.gates is not None) == (i % 2 == 0)
        out.loss.backward()
        counts.append(len(MADE))
    assert counts[:3] == [1] * 3  # other tokens, other documents, gates watched or not
    assert counts[3:5] == [2, 2] and counts[-1] == 3  # any whole number of chunks; any number of tokens


def test_only_training_is_compiled() -> None:
    model = build("post").train()
    compile_blocks(model, "counting")
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        want = build("post")(tokens(1, 9)).logits
        assert torch.equal(twin(tokens(1, 9)).logits, want)
        twin.generate(tokens(1, 9), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert not MADE
    assert_same(model(tokens(1, 9)).logits, want)
    assert len(MADE) == 1
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    own = twin(tokens(1, 9)).logits
    assert_same(twin.train()(tokens(1, 9)).logits, own)  # a copy runs the program with its own weights
    assert len(MADE) == 1
