"""`generate` in all its forms: beams, sampling, assisted decoding, padded batches, ends, streams."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, TextStreamer
from transformers.generation.streamers import BaseStreamer

from fusiontree.errors import CheckpointError
from fusiontree.models import HybridCache, HybridLanguageModel
from tests.models.kinds import VOCAB, assert_same, build, shared_model, tokens

SOME = ["post", "gqa_shared", "pruned", "llama", "mamba2", "mixed"]
QUIET = {"pad_token_id": 0}
Model = HybridLanguageModel


def naive_beam(model: Model, prompt: Tensor, beams: int, steps: int) -> Tensor:
    """Beam search over whole forwards, for one prompt and no end token: (1, L) → (1, L + steps)."""
    live = [(0.0, prompt[0])]
    for _ in range(steps):
        grown = []
        for score, text in live:
            logp = model(text[None], use_cache=False).logits[0, -1].double().log_softmax(-1)
            grown += [
                (score + logp[token].item(), torch.cat([text, token[None]])) for token in logp.topk(beams).indices
            ]
        live = sorted(grown, key=lambda pair: -pair[0])[:beams]
    return live[0][1][None]


@pytest.mark.parametrize("kind", SOME)
@torch.no_grad()
def test_beam_search_is_naive_beam_search(kind: str) -> None:
    model, ids = shared_model(kind), tokens(2, 11)
    got = model.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False, length_penalty=0.0, **QUIET)
    want = torch.cat([naive_beam(model, row[None], 3, 6) for row in ids])
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", SOME)
@torch.no_grad()
def test_beams_of_a_padded_batch_are_those_alone(kind: str) -> None:
    model, ids, mask = shared_model(kind), tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, :7] = 0
    settings = dict(num_beams=3, max_new_tokens=6, do_sample=False, **QUIET)
    got = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(got[0], model.generate(ids[:1], **settings)[0])
    assert torch.equal(got[1, 7:], model.generate(ids[1:, 7:], **settings)[0])


@pytest.mark.parametrize("kind", SOME)
@torch.no_grad()
def test_assisted_decoding_is_greedy(kind: str) -> None:
    """A smaller model guesses; what it gets wrong is rolled back. Its own cache is rolled back too."""
    model, ids = shared_model(kind), tokens(1, 17)
    want = model.generate(ids, max_new_tokens=12, do_sample=False, **QUIET)
    for assistant in (build("post", vocab_size=VOCAB), model):
        got = model.generate(ids, assistant_model=assistant, max_new_tokens=12, do_sample=False, **QUIET)
        assert torch.equal(got, want)
    got = model.generate(ids.repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=12, do_sample=False, **QUIET)
    assert torch.equal(got, model.generate(ids.repeat(1, 2), max_new_tokens=12, do_sample=False, **QUIET))


@torch.no_grad()
def test_sampling_follows_its_seed_and_distribution() -> None:
    model, ids = shared_model("post"), tokens(1, 9)
    settings = dict(max_new_tokens=10, do_sample=True, top_k=20, top_p=0.9, temperature=0.8, **QUIET)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(ids, **settings)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(0)
    many = model.generate(ids, max_new_tokens=1, do_sample=True, num_return_sequences=4000, top_k=0, **QUIET)[:, -1]
    found = torch.bincount(many, minlength=VOCAB) / 4000
    want = model(ids).logits[0, -1].softmax(-1)
    assert (found - want).abs().max() < 0.03


@torch.no_grad()
def test_repetition_penalty_and_end_token() -> None:
    model, ids = build("post"), tokens(2, 9)
    free = model.generate(ids, max_new_tokens=12, do_sample=False, **QUIET)
    penalised = model.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=1e9, **QUIET)
    for row in penalised:
        assert len(set(row[9:].tolist())) == 12 and not set(row[9:].tolist()) & set(row[:9].tolist())
    end = free[0, 11].item()
    stopped = model.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=end, **QUIET)
    first = (free[0, 9:] == end).nonzero()[0].item()
    assert torch.equal(stopped[0], free[0, : 10 + first])


def test_token_ids_of_the_config_reach_generation() -> None:
    model = build("post", pad_token_id=3, bos_token_id=4, eos_token_id=[5, 6])
    settings = model.generation_config
    assert (settings.pad_token_id, settings.bos_token_id, settings.eos_token_id) == (3, 4, [5, 6])
    assert model.generate(max_new_tokens=2).shape[1] <= 3  # from the begin token alone


@torch.no_grad()
def test_use_cache() -> None:
    ids = tokens(1, 5)
    assert isinstance(shared_model("post")(ids).past_key_values, HybridCache)
    assert shared_model("post")(ids, use_cache=False).past_key_values is None
    without = build("post", use_cache=False)
    assert without(ids).past_key_values is None
    assert torch.equal(
        without.generate(ids, max_new_tokens=4, do_sample=False, **QUIET),
        shared_model("post").generate(ids, max_new_tokens=4, do_sample=False, **QUIET),
    )


@torch.no_grad()
def test_generation_goes_on_from_a_cache() -> None:
    model, ids = shared_model("mixed"), tokens(2, 20)
    want = model.generate(ids, max_new_tokens=8, do_sample=False, **QUIET)
    cache = HybridCache(model.config)
    model(ids[:, :15], past_key_values=cache)
    twin = cache.fork()
    for held in (cache, twin):
        got = model.generate(ids, past_key_values=held, max_new_tokens=8, do_sample=False, **QUIET)
        assert torch.equal(got, want)
    out = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **QUIET)
    again = model.generate(
        out.sequences, past_key_values=out.past_key_values, max_new_tokens=4, do_sample=False, **QUIET
    )
    assert torch.equal(again, want)


@torch.no_grad()
def test_generation_from_embeddings() -> None:
    model, ids = shared_model("post"), tokens(2, 9)
    embeds = model.get_input_embeddings()(ids)
    got = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False, **QUIET)
    assert torch.equal(got, model.generate(ids, max_new_tokens=5, do_sample=False, **QUIET)[:, 9:])


@torch.no_grad()
def test_streaming_gives_every_token_once() -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    assert issubclass(TextStreamer, BaseStreamer)
    model, ids, kept = shared_model("post"), tokens(1, 9), Kept()
    out = model.generate(ids, max_new_tokens=5, do_sample=False, streamer=kept, **QUIET)
    assert kept.tokens == [*out[0].tolist(), -1]


@torch.no_grad()
def test_foreign_caches() -> None:
    model, ids = shared_model("post"), tokens(1, 5)
    out = model(ids, past_key_values=DynamicCache())  # empty: taken as "make one"
    assert isinstance(out.past_key_values, HybridCache)
    filled = DynamicCache()
    filled.update(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), 0)
    with pytest.raises(TypeError, match="HybridCache"):
        model(ids, past_key_values=filled)


def test_cache_files_are_checked(tmp_path) -> None:
    model = shared_model("post")
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(tokens(1, 9), past_key_values=cache)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    others = ("pruned", "gqa_shared", "groups", "conv_2", "llama")
    for other in (build(kind).config for kind in others):
        with pytest.raises(CheckpointError, match="other layers or sizes"):
            HybridCache(other).load(path)
    with pytest.raises(CheckpointError, match="other layers or sizes"):
        HybridCache(build("post", head_dim=4).config).load(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="not a readable cache file"):
        HybridCache(model.config).load(path)
    with pytest.raises(CheckpointError, match="not a readable cache file"):
        HybridCache(model.config).load(tmp_path / "missing")


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    """A copy of a cache file with something else in it."""
    with safe_open(path, framework="pt") as file:
        meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, meta)
    save_file(tensors, path.with_name("changed"), metadata=meta)
    return path.with_name("changed")


HOSTILE = {
    "no length": lambda t, m: m.pop("seen"),
    "a wild length": lambda t, m: m.update(seen="-3"),
    "another length": lambda t, m: m.update(seen="8"),
    "a wild switch": lambda t, m: m.update(dense="yes"),
    "no ages": lambda t, m: t.pop("0.age"),
    "ages of no shape": lambda t, m: t.update({"0.age": torch.tensor(3)}),
    "broken ages": lambda t, m: t.update({"0.age": torch.tensor([1.0, 2.0])}),
    "a stranger": lambda t, m: t.update({"7.age": torch.zeros(2, dtype=torch.long)}),
    "a small state": lambda t, m: t.update({"1.ssm_state": t["1.ssm_state"][:, :1].contiguous()}),
    "a coarse state": lambda t, m: t.update({"1.ssm_state": t["1.ssm_state"].bfloat16()}),
    "a whole-number state": lambda t, m: t.update({"0.conv_state": t["0.conv_state"].long()}),
    "a row more": lambda t, m: t.update({"0.global": torch.cat([t["0.global"]] * 2, dim=1)}),
    "a flat buffer": lambda t, m: t.update({"0.local": t["0.local"].flatten()}),
}


@pytest.mark.parametrize("name", HOSTILE)
@torch.no_grad()
def test_hostile_cache_files_are_refused(name: str, tmp_path: Path) -> None:
    """The layout in the file's head says it is ours; what lies in it does not fit."""
    model = shared_model("post")
    cache = HybridCache(model.config)
    model(tokens(2, 9), past_key_values=cache)
    cache.save(tmp_path / "cache")
    HybridCache(model.config).load(rewritten(tmp_path / "cache", lambda t, m: None))
    with pytest.raises(CheckpointError) as error:
        HybridCache(model.config).load(rewritten(tmp_path / "cache", HOSTILE[name]))
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_rollback_that_cannot_be_exact_is_refused() -> None:
    """Padding behind or among the tokens of a forward: the last slots are not the last tokens. Nothing changes then."""
    model, ids = shared_model("mixed"), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 8:10] = 0
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
    with pytest.raises(ValueError, match="padding is among or behind"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="as a negative number"):
        cache.crop(5)
    twin = cache.fork()
    twin.crop(-10)
    assert_same(model(ids, past_key_values=twin).logits, model(ids).logits)
    cache.crop(0)
    model(ids[:, 10:], attention_mask=mask.roll(5, dims=1), past_key_values=cache)
    with pytest.raises(ValueError, match="padding is among or behind"):
        cache.crop(-10)  # warm: a row's past lies behind its padding


def test_rollback_needs_a_record() -> None:
    model = shared_model("post")
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(tokens(1, 9), past_key_values=cache)
        with pytest.raises(ValueError, match="activate_past_recording"):
            cache.crop(-2)
        cache.activate_past_recording()
        model(tokens(1, 3), past_key_values=cache)
        with pytest.raises(ValueError, match="cannot take back 4"):
            cache.crop(-4)


@torch.no_grad()
def test_rollback_of_padded_rows() -> None:
    model, ids, mask = shared_model("mixed"), tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :13] = 0
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
    cache.crop(-3)
    got = model(ids[:, 17:], attention_mask=mask, past_key_values=cache).logits
    assert_same(got, model(ids, attention_mask=mask).logits[:, 17:])


def test_a_cache_outlives_inference_mode() -> None:
    model, ids = shared_model("mixed"), tokens(1, 30)
    cache = HybridCache(model.config)
    with torch.inference_mode():
        want = model(ids).logits.clone()
        model(ids[:, :20], past_key_values=cache)
        model(ids[:, 20:21], past_key_values=cache)
    with torch.no_grad():
        parts = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(21, 30)]
    assert_same(torch.cat(parts, dim=1), want[:, 21:])
    model(ids, labels=ids).loss.backward()  # tables made in inference mode do not spoil training
    model.zero_grad()
