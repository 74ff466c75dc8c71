"""`verify` on models that keep the contract, and on models broken on purpose: exactly the lines that must notice do."""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch

from fusiontree.deploy import cut_branches
from fusiontree.errors import CheckpointError, ConfigError
from fusiontree.eval.verify import LINES, Finding, Specimen, find_lines, relative_error, verify
from tests.eval.subjects import llama
from tests.models.kinds import build

LENGTH = 21
ON_A_CACHE = {"cached", "chunked", "unnumbered", "forked", "reordered", "rolled_back", "cache_saved"}
PADDED_AND_CACHED = {"padded_cached", "padded_chunked", "generation"}
PADDED_LEFT = {"left_padded", "padded_unnumbered", *PADDED_AND_CACHED}


def examined(model: Any, *lines: str, tolerance: float = 1e-5) -> dict[str, Finding]:
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(size, (8, LENGTH), generator=torch.Generator().manual_seed(3))
    return {found.name: found for found in verify(Specimen(model, ids, cut_branches), find_lines(*lines), tolerance)}


def broken(found: dict[str, Finding]) -> set[str]:
    return {name for name, one in found.items() if one.status == "broken"}


def not_offered(found: dict[str, Finding]) -> set[str]:
    return {name for name, one in found.items() if one.status == "not offered"}


GPU = set() if torch.cuda.is_available() else {"device"}


@pytest.mark.parametrize("kind", ["cross", "mixed"])
def test_ours_keeps_every_line(kind: str) -> None:
    found = examined(build(kind), *(line.name for line in LINES if line.name != "bf16"))
    assert broken(found) == set() and not_offered(found) == GPU
    assert found["context"].error > 0.1 and all(found[name].error <= 1e-5 for name in found.keys() - GPU - {"context"})


def test_a_llama_of_transformers_keeps_what_it_offers() -> None:
    found = examined(llama())
    assert broken(found) == set()
    assert not_offered(found) == {"cache_saved", "packed_named", "pruned"} | GPU
    assert found["packed_named"].note == "seq_idx is swallowed without effect"
    assert 0 < found["bf16"].error < 0.05


def after_each_forward(model: Any, spoil: Callable[[Any], None]) -> Any:
    """The model, whose cache is spoilt behind its back."""
    forward = model.forward

    def spoilt(self: Any, *args: Any, **given: Any) -> Any:
        out = forward(*args, **given)
        if out.past_key_values is not None:
            spoil(out.past_key_values)
        return out

    spoilt.__signature__ = inspect.signature(forward)
    model.forward = MethodType(spoilt, model)
    return model


def forget_convolution(cache: Any) -> None:
    for layer in cache.layers:
        if layer.conv_state is not None:
            layer.conv_state = torch.zeros_like(layer.conv_state)


def test_a_forgotten_convolution_state_breaks_what_goes_on_from_a_cache() -> None:
    found = examined(after_each_forward(build("post"), forget_convolution))
    assert broken(found) == ON_A_CACHE | PADDED_AND_CACHED


def without(model: Any, *names: str) -> Any:
    """The model, which takes these arguments and does not read them."""
    forward = model.forward

    def deaf(self: Any, *args: Any, **given: Any) -> Any:
        return forward(*args, **{**given, **dict.fromkeys(names)})

    deaf.__signature__ = inspect.signature(forward)
    model.forward = MethodType(deaf, model)
    return model


def test_an_ignored_mask_breaks_padding_on_the_left_alone() -> None:
    assert broken(examined(without(build("post"), "attention_mask", "position_ids"))) == PADDED_LEFT | {"packed"}
    # Where positions are read, the one that is 0 begins a document, and the padding before it is not seen all the same.
    found = examined(without(build("post"), "attention_mask"), *PADDED_LEFT, "right_padded")
    assert broken(found) == {"padded_unnumbered"}


def test_ignored_documents_break_packing_alone() -> None:
    lines = ("packed", "packed_named", "left_padded", "unnumbered", "batched")
    assert broken(examined(without(build("post"), "seq_idx"), *lines)) == {"packed_named"}
    # Positions that count on are what it would have made itself, so that nothing but documents is lost with them.
    assert broken(examined(without(build("post"), "position_ids"), *lines)) == {"packed"}


def test_a_model_that_sees_the_future_is_not_causal() -> None:
    model = build("llama")
    forward = model.forward

    def peeping(self: Any, *args: Any, **given: Any) -> Any:
        out = forward(*args, **given)
        out.logits = out.logits + 0.1 * out.logits.mean(1, keepdim=True)
        return out

    peeping.__signature__ = inspect.signature(forward)
    model.forward = MethodType(peeping, model)
    found = examined(model, "causal", "batched", "cached", "left_padded")
    assert broken(found) == {"causal", "cached", "left_padded"}


def test_a_context_that_does_not_matter_is_said() -> None:
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixers["attention"].o_proj.weight.zero_()
    found = examined(model, "context", "cached", "left_padded")
    assert broken(found) == {"context"} and found["context"].error == 0


def test_what_the_model_says_is_passed_on() -> None:
    def refusing(model: Any, error: Exception) -> Any:
        forward = model.forward

        def picky(self: Any, *args: Any, **given: Any) -> Any:
            if given.get("past_key_values") is not None:
                raise error
            return forward(*args, **given)

        picky.__signature__ = inspect.signature(forward)
        model.forward = MethodType(picky, model)
        return model

    found = examined(refusing(build("post"), ValueError("one token at a time\nplease")), "cached", "batched")
    assert found["cached"].status == "not offered"
    assert found["cached"].note == "refused: ValueError: one token at a time"
    assert found["batched"].status == "holds"
    found = examined(refusing(build("post"), IndexError("out of range")), "cached")
    assert found["cached"].status == "broken" and found["cached"].note == "fails: IndexError: out of range"
    assert found["cached"].error is None


def test_a_model_that_cannot_read_at_all() -> None:
    model = build("post")
    model.forward = MethodType(lambda self, input_ids=None, use_cache=None: 1 / 0, model)
    with pytest.raises(CheckpointError, match="21 tokens: fails: ZeroDivisionError"):
        examined(model)


def test_a_model_of_nan_is_broken() -> None:
    model = build("pre")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    found = examined(model, "causal", "cached", "batched")
    assert broken(found) == {"causal", "cached", "batched"}


def test_lines_by_name() -> None:
    assert [line.name for line in find_lines("packed", "cached")] == ["cached", "packed"]
    assert find_lines() == list(LINES) and len({line.name for line in LINES}) == len(LINES)
    with pytest.raises(ConfigError, match="--lines chached: there is no such line; there are context, causal, cached"):
        find_lines("chached")


def test_nothing_is_changed_by_an_examination() -> None:
    model = build("post")
    lines = ("cached", "rolled_back", "left_padded", "generation", "saved", "pruned", "bf16")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examined(model, *lines)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.removed_branches == {}


def test_relative_error() -> None:
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0.0
    with pytest.raises(AssertionError, match=r"\(1,\) instead of \(2,\)"):
        relative_error(torch.ones(1), torch.ones(2))
