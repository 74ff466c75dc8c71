import math

import pytest
import torch
from tokenizers import processors

from fusiontree.data import SourceConfig
from fusiontree.data.tokenizer import byte_tokenizer, train_tokenizer
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.run import evaluate
from fusiontree.eval.subject import Subject
from fusiontree.eval.task import TaskSettings
from fusiontree.eval.tasks.perplexity import FAMILY, ContextPerplexity, make_plan
from tests.eval.subjects import llama, subject

TEXT = "".join(f"{i}: the state is read and a window moves, naïve 树 or not. " for i in range(12))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


class Watch:
    def __init__(self):
        self.told, self.keys = [], []

    def __call__(self, done, total):
        self.told.append((done, total))

    def once(self, key, measure):
        assert key not in self.keys, "a key that comes twice would give one part the other's numbers"
        self.keys.append(key)
        return measure()


def measured(asked, path, lengths=(), limit=None, **options):
    return FAMILY.make("").measure(
        asked, TaskSettings(data=path, lengths=lengths, limit=limit, options=options), Watch()
    )


def plain_nats(model, ids, begin, end, context) -> float:
    """Cross entropy of ids[begin:end] given `context` tokens before each window, one row."""
    window = torch.tensor([ids[begin - context : end]])
    with torch.no_grad():
        scores = model(window[:, :-1]).logits[0].double().log_softmax(-1)
    return -sum(float(scores[context - 1 + k, ids[begin + k]]) for k in range(end - begin))


@pytest.mark.parametrize("kind", ["hybrid", "llama"])
def test_by_length_is_the_plain_sliding_window(kind, text):
    asked = subject(kind, batch_size=3)
    found = measured(asked, text, (16, 64), limit=5)
    ids = [*TEXT.encode(), 256]
    first, last = 64 - 32 + 1, 64 - 32 + 1 + 5 * 32
    for row in found["tables"]["by_length"]:
        length, stride = row["length"], row["length"] // 2
        total = 0.0
        for begin in range(first, last, stride):
            end = min(begin + stride, last)
            total += plain_nats(asked.model, ids, begin, end, length - (end - begin) + 1)
        assert row["tokens"] == row["bytes"] == 160 and row["stride"] == stride
        assert row["sees_at_least"] == length - stride + 1
        assert row["loss"] == pytest.approx(total / 160, abs=1e-4)
        assert row["perplexity"] == pytest.approx(math.exp(total / 160), rel=1e-4)
        assert row["bits_per_byte"] == pytest.approx(total / 160 / math.log(2), abs=1e-4)
    assert found["metrics"]["perplexity"] == found["metrics"]["perplexity@64"] == row["perplexity"]


def test_by_position_is_the_plain_disjoint_window(text):
    asked = subject("llama", batch_size=4)
    rows = measured(asked, text, (40,), limit=6)["tables"]["by_position"]
    ids, last = [*TEXT.encode(), 256], 40 - 20 + 1 + 6 * 20
    nats, counts = [0.0] * 3, [0] * 3
    for begin in range(0, last - 1, 40):
        for place in range(begin + 1, min(begin + 41, last)):
            bucket = 0 if place - begin < 16 else 1 if place - begin < 32 else 2
            nats[bucket] += plain_nats(
                asked.model, ids[begin : place + 1], place - begin, place - begin + 1, place - begin
            )
            counts[bucket] += 1
    assert [(row["from"], row["to"]) for row in rows] == [(1, 15), (16, 31), (32, 40)]
    assert [row["tokens"] for row in rows] == counts and sum(counts) == last - 1
    assert [row["loss"] for row in rows] == pytest.approx([n / c for n, c in zip(nats, counts, strict=True)], abs=1e-4)


@pytest.mark.parametrize("stride", [1, 7, 32, 100])
@pytest.mark.parametrize("limit", [None, 3])
def test_every_target_once_at_every_length_with_what_is_promised_before_it(text, stride, limit):
    asked = subject("llama")
    settings = TaskSettings(data=text, lengths=(8, 33, 64), limit=limit, options={"stride": str(stride)})
    plan = make_plan(asked, settings)
    targets = []
    for length in plan.lengths:
        windows = list(plan.windows(length))
        places = [place for window in windows for place in range(window.begin, window.end)]
        assert len(places) == len(set(places))
        targets.append(places)
        for window in windows:
            assert window.context + (window.end - window.begin) - 1 <= length
            assert window.context >= length - plan.stride(length) + 1 and window.begin >= window.context
    assert targets[0] == targets[1] == targets[2]
    if limit is None:
        assert targets[0][-1] == len(TEXT.encode())
    else:
        assert len(targets[0]) == limit * plan.stride(64)


def test_batches_do_not_matter_and_a_killed_measurement_goes_on(text, tmp_path):
    settings = TaskSettings(data=text, lengths=(16, 32), limit=4)
    results = []
    for size in (1, 8):
        outcome = evaluate(subject("hybrid", batch_size=size), [ContextPerplexity()], settings, tmp_path / str(size))
        results.append(outcome.results["perplexity"])
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-5)
    parts = tmp_path / "1" / "parts" / "perplexity.jsonl"
    whole = parts.read_bytes()
    parts.write_bytes(whole[: len(whole) // 2])
    again = evaluate(subject("hybrid", batch_size=1), [ContextPerplexity()], settings, tmp_path / "1")
    assert parts.read_bytes() == whole and again.results["perplexity"]["metrics"] == results[0]["metrics"]


def test_bytes_are_those_of_the_text_for_any_tokenizer(text, tmp_path):
    tokenizer = train_tokenizer([SourceConfig(path=str(text))], 258, tmp_path / "tokenizer")
    for made in (tokenizer, byte_tokenizer()):
        plan = make_plan(Subject(llama(), made), TaskSettings(data=text, lengths=(8,)))
        stream = plan.streams[0]
        assert stream.byte_ends[-1] == len(TEXT.encode()) and stream.ids[-1] == made.eos_token_id
        assert (stream.byte_ends[1:] >= stream.byte_ends[:-1]).all() and stream.is_text[:-1].all()
        assert not stream.is_text[-1]


def test_a_special_tokens_name_in_the_text_is_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a<|endoftext|>b" * 3)
    plan = make_plan(subject("llama"), TaskSettings(data=path, lengths=(8,)))
    assert (plan.streams[0].ids == 256).sum() == 1


def test_documents_joined_or_apart(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"text": "{"ab" * n}"}}\n' for n in (30, 3, 40, 10)))
    joined = measured(subject("llama"), path, (16,))
    row = joined["tables"]["by_length"][0]
    # 166 bytes and 4 dividers make 170 tokens; the first 9 are context only; dividers are not scored.
    assert row["tokens"] == 166 - 9 and row["bytes"] == 166 - 9
    apart = measured(subject("llama"), path, (16,), documents="apart")
    assert apart["tables"]["by_length"][0]["tokens"] == sum(2 * n - 9 for n in (30, 40, 10))
    assert {each["stream"] for each in apart["samples"]} == {0, 1, 2}
    limited = measured(subject("llama"), path, (16,), limit=7, documents="apart")
    # Seven stretches of 8: all that the first document holds (51 bytes and its divider).
    assert limited["tables"]["by_length"][0]["tokens"] == 60 - 9


def test_lengths_left_out_are_those_that_model_and_text_allow(text):
    text.write_text(TEXT * 4)
    for allowed, lengths in ((4096, (1024, 2048)), (2000, (1024,)), (100, (100,))):
        assert make_plan(subject("llama", length=allowed), TaskSettings(data=text)).lengths == lengths


def test_a_bos_stands_first_in_every_window(text):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
    asked, fed = Subject(llama(), tokenizer), []
    hook = asked.model.register_forward_pre_hook(
        lambda _, args, given: fed.append(given["input_ids"]), with_kwargs=True
    )
    measured(asked, text, (16,), limit=3)
    hook.remove()
    assert all((rows[:, 0] == 256).all() for rows in fed) and (fed[0][:, 1:] != 256).all()


def test_errors_follow_the_spread_over_windows(text):
    found = measured(subject("llama"), text, (16,), limit=9)
    row = found["tables"]["by_length"][0]
    nats = torch.tensor([each["nats"] / each["tokens"] for each in found["samples"]])
    assert row["loss_error"] == pytest.approx(float(nats.std() / 3), rel=1e-5)
    assert found["errors"]["perplexity"] == pytest.approx(row["perplexity"] * row["loss_error"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "--data"),
        ({"data": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"lengths": (4000,)}, "length 4000 needs 4001"),
        ({"lengths": (1, 4)}, "at least 2"),
        ({"options": {"stride": "0"}}, "stride=0"),
        ({"options": {"stride": "half"}}, "stride=half"),
        ({"options": {"documents": "torn"}}, "allowed: joined, apart"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(settings, said, text):
    given = {"data": text, "lengths": (8,)} if settings else {}
    with pytest.raises((ConfigError, DataError)) as caught:
        make_plan(subject("llama"), TaskSettings(**(given | settings)))
    assert said in str(caught.value) and "\n" not in str(caught.value)
