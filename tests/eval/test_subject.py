import pytest
import torch
from tokenizers import processors
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.stopping import cut_before
from fusiontree.eval.subject import Subject, context_limit
from tests.eval.subjects import VOCABULARY, hybrid, llama, subject

KINDS = ["hybrid", "llama"]
PAIRS = [
    ("the state", " is read"), ("", "alone"), ("a  ", "b"), ("a", "  b"), ("x" * 90, "y" * 7), ("gate", "s"),
    ("n\n", "m"), ("é", "树"), (" ", "c"),
]  # fmt: skip
PROMPTS = ["the state is", "a", "window " * 12, "the gate", "", "x = 1\ny =", "so", "é树", "learns to choose"]


def own_loglikelihood(model, ids: list[int], first: int) -> tuple[float, bool]:
    """Plain: one row, no padding, all logits."""
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    wanted = range(first, len(ids))
    return (
        sum(float(scores[t - 1, ids[t]]) for t in wanted),
        all(int(scores[t - 1].argmax()) == ids[t] for t in wanted),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_loglikelihood_is_the_plain_sum_at_every_batch_size(kind):
    alone, together = subject(kind, batch_size=1), subject(kind, batch_size=8)
    # Byte tokenizer: the ids are the bytes, 256 stands where there is no context.
    plain = [
        own_loglikelihood(alone.model, [*(c.rstrip().encode() or [256]), *(c[len(c.rstrip()):] + t).encode()],
                          len(c.rstrip().encode()) or 1)
        for c, t in PAIRS
    ]  # fmt: skip
    for found in (alone.loglikelihood(PAIRS), together.loglikelihood(PAIRS)):
        assert [score for score, _ in found] == pytest.approx([score for score, _ in plain], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in plain]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_on_the_logits_held_changes_no_number(kind, monkeypatch):
    asked = subject(kind, batch_size=8)
    free = asked.loglikelihood(PAIRS)
    seen = []
    hook = asked.model.register_forward_hook(lambda _, given, out: seen.append(out.logits.shape))
    monkeypatch.setattr("fusiontree.eval.subject.LOGITS_AT_ONCE", 3 * VOCABULARY)
    bound = asked.loglikelihood(PAIRS)
    hook.remove()
    assert max(shape[0] * shape[1] for shape in seen) == 3 and len(seen) > len(PAIRS)
    assert [score for score, _ in bound] == pytest.approx([score for score, _ in free], abs=1e-4)
    assert [greedy for _, greedy in bound] == [greedy for _, greedy in free]


@pytest.mark.parametrize("kind", KINDS)
def test_what_greedy_writes_is_greedy(kind):
    asked = subject(kind)
    written = asked.generate(["the gate"], 6)[0]
    encoded = written.encode()
    if "�" not in written:
        assert asked.loglikelihood([("the gate", written), ("the gate", "\x00" + written)])[0][1] is True
        assert len(encoded) <= 6
    assert asked.loglikelihood([("the gate", "\x00\x01")])[0][1] is False


def test_spaces_belong_to_the_continuation():
    asked = subject("llama")
    assert asked.encode_pair("a  ", "b") == asked.encode_pair("a", "  b") == ([97], [32, 32, 98])
    assert asked.encode_pair("", "b") == ([256], [98])
    assert asked.encode_pair(" ", "b") == ([256], [32, 98])
    with pytest.raises(DataError, match="nothing to score"):
        asked.loglikelihood([("", "")])
    with pytest.raises(DataError, match="no token"):
        asked.loglikelihood([("a", "")])


@pytest.mark.parametrize("kind", KINDS)
def test_rolling_is_the_plain_windowed_sum(kind):
    asked = subject(kind, max_length=16, batch_size=3)
    texts = ["", "a", "exactly sixteen.", "and this one is a good deal longer than a window: two and a half of them"]
    for text, found in zip(texts, asked.rolling(texts), strict=True):
        ids = [256, *text.encode()]
        total = 0.0
        for begin in range(1, len(ids), 16):
            end = min(begin + 16, len(ids))
            seen = max(0, end - 17) if begin > 1 else 0  # the last window sees all that fits
            total += own_loglikelihood(asked.model, ids[seen:end], begin - seen)[0]
        assert found == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 100])
def test_windows_predict_each_token_once_and_never_see_more_than_allowed(length):
    asked = subject("llama", max_length=16)
    ids = list(range(length))
    windows = list(asked.windows(ids))
    assert [token for _, piece in windows for token in piece] == ids
    for number, (context, piece) in enumerate(windows):
        assert context and len(context) + len(piece) - 1 <= 16
        assert context == ([256] if number == 0 else ids[piece[0] - len(context) : piece[0]])
        assert len(context) == 1 if len(piece) == 16 or number == 0 else len(context) + len(piece) == 17


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_plain_greedy_at_every_batch_size(kind):
    alone, together = subject(kind, batch_size=1), subject(kind, batch_size=8)
    plain = []
    for prompt in PROMPTS:
        ids, new = list(prompt.encode()) or [256], []
        for _ in range(12):
            with torch.no_grad():
                token = int(alone.model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == 256:
                break
            new.append(token)
        plain.append(bytes(t for t in new if t < 256).decode(errors="replace"))
    assert alone.generate(PROMPTS, 12) == plain
    assert together.generate(PROMPTS, 12) == plain
    assert len(set(plain)) > 4, "the models must write different things for this to mean anything"


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_before_the_first_stop_in_every_row(kind):
    asked = subject(kind, batch_size=4)
    whole = asked.generate(PROMPTS, 12)
    stop = [next(text[4:6] for text in whole if len(text) > 8), whole[0][2:3], ""]
    assert asked.generate(PROMPTS, 12, stop) == [cut_before(text, stop) for text in whole]
    assert any(len(cut_before(text, stop)) < len(text) for text in whole)


def test_a_stop_ends_the_work_not_only_the_text():
    asked = subject("hybrid")
    text = asked.generate(["window"], 12)[0]
    steps = []
    hook = asked.model.register_forward_hook(lambda *_: steps.append(1))
    assert asked.generate(["window"], 12, [text[3]]) == [text[: text.index(text[3])]]
    hook.remove()
    assert len(steps) == len(text[: text.index(text[3])].encode()) + 1


def test_cut_before_takes_the_earliest():
    assert cut_before("one two three", ("three", "two")) == "one "
    assert cut_before("one", ("", "x")) == "one"


def test_the_models_own_generation_settings_play_no_part():
    asked = subject("llama")
    before = asked.generate(PROMPTS[:3], 8)
    own = asked.model.generation_config
    own.repetition_penalty, own.do_sample, own.no_repeat_ngram_size = 5.0, True, 1
    assert asked.generate(PROMPTS[:3], 8) == before
    assert asked.model.generation_config is own


def test_never_empty_moves_the_end_behind_the_first_token():
    asked = subject("llama")
    prompts = [f"window {number}" for number in range(20)]
    prompt, first = next((p, t) for p, t in zip(prompts, asked.generate(prompts, 1), strict=True) if t.isascii())
    assert asked.generate([prompt], 4, [first]) == [""]
    kept = asked.generate([prompt], 4, [first], never_empty=True)[0]
    assert kept and first not in kept
    asked.end_ids = frozenset({256, ord(first)})
    assert asked.generate([prompt], 4) == [""]
    assert asked.generate([prompt], 4, never_empty=True)[0]


def test_chat_uses_the_template_where_there_is_one():
    asked = subject("llama")
    assert asked.prompt_ids("hi", chat=True) == list(b"User: hi\n\nAssistant:")
    assert asked.generate(["hi"], 5, chat=True) == asked.generate(["User: hi\n\nAssistant:"], 5)
    asked.tokenizer.chat_template = None
    assert asked.prompt_ids("hi", chat=True) == list(b"hi")


def test_a_bos_is_put_first_once():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
    asked = Subject(llama(), tokenizer)
    assert asked.prompt_ids("a") == asked.prompt_ids("<|endoftext|>a") == [256, 97]
    assert asked.encode_pair("a ", "b") == ([256, 97], [32, 98])
    assert asked.encode_pair("", "b") == ([256], [98])
    assert asked.text.count("a") == 2 and asked.text.encode("a") == [97]


def test_longer_than_the_model_is_refused_never_cut():
    asked = subject("hybrid", max_length=16)
    assert asked.generate(["x" * 12], 4) and asked.loglikelihood([("x" * 12, "y" * 5)])
    for call in (lambda: asked.generate(["x" * 13], 4), lambda: asked.loglikelihood([("x" * 12, "y" * 6)])):
        with pytest.raises(DataError, match="16 it may see; nothing was cut"):
            call()


def test_a_foreign_tokenizer_is_noticed():
    asked = Subject(llama(), byte_tokenizer())
    asked.vocab_size = 100
    with pytest.raises(DataError, match="100 embeddings"):
        asked.generate(["xyz"], 1)


def test_length_comes_from_the_config_then_the_tokenizer_and_is_asked_for_otherwise():
    assert subject("hybrid", length=48).max_length == 48
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4))
    tokenizer = byte_tokenizer()
    assert context_limit(mamba.config, tokenizer) is None
    with pytest.raises(ConfigError, match="--max-length: neither"):
        Subject(mamba, tokenizer)
    assert Subject(mamba, tokenizer, max_length=99).max_length == 99
    tokenizer.model_max_length = 77
    assert Subject(mamba, tokenizer).max_length == 77


def test_more_than_the_config_says_needs_computed_positions():
    assert subject("hybrid", length=16, max_length=64).loglikelihood([("x" * 40, "y")])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="table of 32 positions"):
        Subject(gpt2, byte_tokenizer(), max_length=33)
    config = hybrid().config
    config.srte, config.max_position_embeddings = "learned", 32
    with pytest.raises(ConfigError, match="table of 32 positions"):
        Subject(type(hybrid())(config), byte_tokenizer(), max_length=33)


def test_logits_are_the_models():
    asked = subject("hybrid")
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = asked.logits(ids)
    assert whole.shape == (2, 9, VOCABULARY) and not whole.requires_grad
    torch.testing.assert_close(asked.logits(ids, last=3), whole[:, -3:])


def test_the_fingerprint_follows_the_weights():
    one = subject("llama")
    assert one.fingerprint == subject("llama").fingerprint != subject("hybrid").fingerprint
