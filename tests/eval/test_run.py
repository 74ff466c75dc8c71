import contextlib
import json
import signal
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.run import evaluate
from fusiontree.eval.task import Sample, TaskSettings
from tests.eval.subjects import subject


class Spelling:
    """Questions of several lengths; the score is the number of characters written."""

    name, version, main_metric = "made:up", 3, "length"

    def __init__(self, count: int = 11, stop: tuple[str, ...] = (), word: str = "window ") -> None:
        self.count, self.stop, self.word, self.prompts_seen = count, stop, word, None

    def samples(self, text, settings):
        for i in range(min(self.count, settings.limit or self.count)):
            tokens = 4 if i % 4 else 6
            yield Sample(f"s{i}", self.word * (1 + 5 * i % 7) + str(i), ("a", "b"), tokens, self.stop, {"i": i})

    def score(self, sample, output):
        return {"length": float(len(output)), "odd": float(len(output) % 2)}

    def summarise(self, scored):
        self.prompts_seen = {each.sample.prompt for each in scored}
        lengths = [each.scores["length"] for each in scored]
        metrics = {
            "length": sum(lengths) / len(lengths),
            "odd": 100 * sum(s.scores["odd"] for s in scored) / len(scored),
        }
        order = [each.sample.facts["i"] for each in scored]
        return {"metrics": metrics | {"undefined": float("nan")}, "tables": {"order": order}}


class Parts:
    name, version, main_metric = "parts", 1, "sum"

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at, self.asked = die_at, []

    def measure(self, subject, settings, progress):
        def part(i):
            if i == self.die_at:
                raise KeyboardInterrupt
            self.asked.append(i)
            return {"value": i * 0.1}

        values = []
        for i in range(4):
            values.append(progress.once(f"part {i}", lambda i=i: part(i))["value"])
            progress(i + 1, 4)
        return {"metrics": {"sum": sum(values)}, "tables": {}, "samples": [{"value": v} for v in values]}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measured(out: Path, name: str) -> dict:
    """A result without what differs from run to run."""
    result = json.loads((out / "results.json").read_text())["tasks"][name]
    return {key: value for key, value in result.items() if key not in ("date", "seconds", "command")}


def test_results_samples_and_where_they_come_from(tmp_path):
    asked, out = subject("hybrid", batch_size=4, name="tiny"), tmp_path / "out"
    outcome = evaluate(asked, [Spelling()], TaskSettings(), out, command="fusiontree eval tiny")
    document = json.loads(outcome.path.read_text())
    result = document["tasks"]["made:up"]
    assert document["model"]["fingerprint"] == asked.fingerprint and document["model"]["name"] == "tiny"
    assert (result["version"], result["samples"], result["command"]) == (3, 11, "fusiontree eval tiny")
    assert result["machine"]["cores"] and result["versions"]["torch"] and result["date"] and result["commit"]
    header, *records = lines(out / "samples" / "made-up.jsonl")
    assert header["version"] == 3 and header["max_length"] == 256
    assert sorted(record["id"] for record in records) == sorted(f"s{i}" for i in range(11))
    assert result["tables"]["order"] == list(range(11)), "summarised in the order of the samples"
    assert result["metrics"]["undefined"] is None
    mean = sum(record["scores"]["length"] for record in records) / 11
    assert result["metrics"]["length"] == pytest.approx(mean)
    spread = result["scores"]["length"]
    variance = sum((record["scores"]["length"] - mean) ** 2 for record in records) / 10
    assert spread["standard_error"] == pytest.approx((variance / 11) ** 0.5) == result["errors"]["length"]
    assert result["errors"]["odd"] == pytest.approx(100 * result["scores"]["odd"]["standard_error"])


def test_answers_are_those_of_the_subject_whatever_the_batch(tmp_path):
    one, eight = (subject("hybrid", batch_size=size) for size in (1, 8))
    for asked, out in ((one, tmp_path / "1"), (eight, tmp_path / "8")):
        evaluate(asked, [Spelling(stop=("e",))], TaskSettings(), out)
    outputs = [{r["id"]: r["output"] for r in lines(tmp_path / n / "samples/made-up.jsonl")[1:]} for n in "18"]
    assert outputs[0] == outputs[1]
    for sample in Spelling(stop=("e",)).samples(one.text, TaskSettings()):
        assert outputs[0][sample.id] == one.generate([sample.prompt], sample.max_new_tokens, ("e",))[0]


@pytest.mark.parametrize("kept", [0, 1, 4, 6, 9])
def test_a_cut_file_is_continued_to_the_same_end(tmp_path, kept):
    asked, task = subject("hybrid", batch_size=4), Spelling()
    evaluate(asked, [task], TaskSettings(), tmp_path / "whole")
    assert task.prompts_seen == {""}
    file = tmp_path / "cut" / "samples" / "made-up.jsonl"
    evaluate(asked, [Spelling()], TaskSettings(), tmp_path / "cut")
    content = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(content[: 1 + kept]) + content[1 + kept][:20])
    fed = []
    hook = asked.model.register_forward_hook(lambda *_: fed.append(1))
    evaluate(asked, [Spelling()], TaskSettings(), tmp_path / "cut")
    hook.remove()
    assert file.read_bytes() == (tmp_path / "whole" / "samples" / "made-up.jsonl").read_bytes()
    assert measured(tmp_path / "cut", "made:up") == measured(tmp_path / "whole", "made:up")
    assert fed


def test_a_finished_task_is_not_asked_again(tmp_path):
    asked = subject("hybrid")
    evaluate(asked, [Spelling()], TaskSettings(), tmp_path / "out")
    first = measured(tmp_path / "out", "made:up")
    asked.continue_ids = None
    evaluate(asked, [Spelling()], TaskSettings(), tmp_path / "out")
    assert measured(tmp_path / "out", "made:up") == first


def test_other_settings_or_data_or_model_are_refused(tmp_path):
    asked, out = subject("hybrid"), tmp_path / "out"
    evaluate(asked, [Spelling()], TaskSettings(), out)
    failed = evaluate(asked, [Spelling()], TaskSettings(limit=5), out).failed["made:up"]
    assert "was begun with limit null, now it is 5" in str(failed)
    failed = evaluate(asked, [Spelling(word="gate ")], TaskSettings(), out).failed["made:up"]
    assert "asked another question" in str(failed)
    with pytest.raises(ConfigError, match="another model"):
        evaluate(subject("llama"), [Spelling()], TaskSettings(), out)


def test_parts_of_a_direct_task_are_measured_once(tmp_path):
    first, second = Parts(die_at=2), Parts()
    with pytest.raises(KeyboardInterrupt):
        evaluate(subject(), [first], TaskSettings(), tmp_path / "out")
    result = evaluate(subject(), [second], TaskSettings(), tmp_path / "out").results["parts"]
    assert (first.asked, second.asked) == ([0, 1], [2, 3])
    assert result["metrics"] == {"sum": pytest.approx(0.6)} and result["samples"] == 4
    assert len(lines(tmp_path / "out" / "samples" / "parts.jsonl")) == 5


def test_a_task_that_cannot_be_done_leaves_the_others_alone(tmp_path):
    outcome = evaluate(subject(), [Spelling(count=0), Parts()], TaskSettings(), tmp_path / "out")
    assert set(outcome.results) == {"parts"} and set(outcome.failed) == {"made:up"}
    assert "not one sample" in str(outcome.failed["made:up"])


def test_nothing_is_left_when_nothing_was_asked(tmp_path):
    outcome = evaluate(subject(), [Spelling(count=0)], TaskSettings(), tmp_path / "out")
    assert outcome.failed and not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--lengths 512: hybrid may see at most 256 tokens"):
        evaluate(subject(name="hybrid"), [Spelling()], TaskSettings(lengths=(512,)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_longer_than_the_model_is_refused(tmp_path):
    failed = evaluate(subject(max_length=30), [Spelling()], TaskSettings(), tmp_path / "out").failed
    assert "nothing was cut" in str(failed["made:up"])


def test_foreign_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no evaluation made it"):
        evaluate(subject(), [Spelling()], TaskSettings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    out = tmp_path / "out"
    evaluate(subject(), [Parts()], TaskSettings(), out)
    (out / "parts" / "parts.jsonl").write_text("{}\nno json\n")
    assert isinstance(evaluate(subject(), [Parts()], TaskSettings(), out).failed["parts"], DataError)


def test_an_id_that_comes_twice_is_refused(tmp_path):
    task = Spelling(count=2)
    twice = [next(iter(task.samples(None, TaskSettings())))] * 2
    task.samples = lambda text, settings: twice
    assert "'s0' comes twice" in str(evaluate(subject(), [task], TaskSettings(), tmp_path / "o").failed["made:up"])


def test_progress_is_told_and_knows_how_many(tmp_path):
    told = []

    @contextlib.contextmanager
    def progress(title):
        yield lambda done, total, remark: told.append((title, done, total))

    evaluate(subject(batch_size=8), [Spelling(), Parts()], TaskSettings(limit=9), tmp_path / "o", progress=progress)
    assert [each for each in told if each[0] == "made:up"][-1] == ("made:up", 9, 9)
    assert told[-4:] == [("parts", i, 4) for i in (1, 2, 3, 4)]


class Slow(Spelling):
    def score(self, sample, output):
        time.sleep(0.05)
        return super().score(sample, output)


def in_another_process(out: Path) -> BaseProcess:
    """Forked, so that it need not import torch again."""
    asked = subject("hybrid", batch_size=2)
    process = get_context("fork").Process(target=evaluate, args=(asked, [Slow(count=24)], TaskSettings(), out))
    process.start()
    return process


def wait_for_lines(process: BaseProcess, file: Path, count: int) -> None:
    until = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert time.monotonic() < until and process.is_alive()
        time.sleep(0.01)


def test_killed_and_started_again_it_ends_as_if_never_killed(tmp_path):
    """Three kills; the file in the end is that of an undisturbed run, byte for byte: no sample twice, none lost."""
    out, file = tmp_path / "killed", tmp_path / "killed" / "samples" / "made-up.jsonl"
    for wanted in (3, 9, 15):
        process = in_another_process(out)
        wait_for_lines(process, file, wanted)
        process.kill()
        process.join(timeout=30)
        assert process.exitcode == -signal.SIGKILL and not (out / "results.json").read_text().count("made:up")
    process = in_another_process(out)
    process.join(timeout=60)
    assert process.exitcode == 0
    undisturbed = evaluate(subject("hybrid", batch_size=2), [Spelling(count=24)], TaskSettings(), tmp_path / "whole")
    assert file.read_bytes() == (tmp_path / "whole" / "samples" / "made-up.jsonl").read_bytes()
    assert measured(out, "made:up") == measured(undisturbed.path.parent, "made:up")


def test_two_at_once_are_refused(tmp_path):
    out = tmp_path / "out"
    process = in_another_process(out)
    try:
        wait_for_lines(process, out / "samples" / "made-up.jsonl", 1)
        with pytest.raises(ConfigError, match="another evaluation is writing"):
            evaluate(subject(), [Spelling()], TaskSettings(), out)
    finally:
        process.kill()
        process.join(timeout=30)
