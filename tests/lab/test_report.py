import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fusiontree.errors import DataError
from fusiontree.lab import report, sections
from fusiontree.lab.markup import duration, fixed, scaled
from fusiontree.lab.run_folder import alarms, probe_series, read_run, series
from tests.lab.fake_run import LAYERS, write_fake_run

VOID = {"meta", "br", "link", "img"}


class Balanced(HTMLParser):
    """Fails on a closing tag that does not fit; collects visible text and ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "demo & <b>xy")


@pytest.fixture(scope="module")
def page(run_dir) -> str:
    return report.write_report(run_dir).read_text(encoding="utf-8")


def test_the_page_is_whole_and_holds_every_part(page, run_dir):
    parsed = Balanced(page)
    parts = "Before and after pruning|Learning|Loss spikes|Probes|Gates|Alarms|Prune plan|What it writes|Model"
    for part in parts.split("|"):
        assert part in parsed.text
    assert page.count("<svg") == len(sections.FIGURES) == 12
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {path.stem for path in (run_dir / "plots").glob("*.png")} == set(sections.FIGURES)
    assert "absent" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not list(run_dir.glob("*.tmp"))


def test_nothing_is_loaded_from_elsewhere(page):
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!#|data:)[^"]*"', page)
    assert not re.findall(r"url\((?!#|data:)[^)]*\)", page)
    assert "@import" not in page and not {"script", "link", "iframe", "img"} & Balanced(page).tags


def test_every_text_is_escaped(page):
    assert "<script" not in page and "<b>xy" not in page and "<not a tag>" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in page and "demo &amp; &lt;b&gt;xy" in page
    assert "specialise &amp; prune" in page and "&lt;not a tag&gt;" in page


def test_pictures_follow_light_and_dark(page):
    from fusiontree.lab.canvas import COLOURS

    svg = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not [value for value in COLOURS.values() if value in svg and value not in ("#d8622b", "#0c8a84")]
    assert "prefers-color-scheme: dark" in page
    for name in COLOURS:
        assert len(re.findall(rf"--{name}: #", page)) == 2


def test_numbers_of_the_table_and_the_plan(page):
    text = Balanced(page).text
    assert "6.23 M −13.6%" in text and "118.9 +28.7%" in text and "4.3394 +0.0273" in text
    assert "largest relative difference of the logits 3.2e-07" in text and "before training: 8.410" in text
    assert "2 of 6 layers keep one branch and save 2.62 MB" in text
    assert page.count('class="layer"') == LAYERS and page.count("<small>taken</small>") == 2


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a run folder: none of config"):
        report.write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_only_begun_says_what_is_not_there(tmp_path):
    (tmp_path / "config.yaml").write_text("training: {steps: 3}\n", encoding="utf-8")
    text = Balanced(report.write_report(tmp_path).read_text(encoding="utf-8")).text
    for line in ("Not trained yet", "slim.json", "metrics.jsonl", "gates.jsonl", "plan.json", "samples.json"):
        assert line in text
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "gates.jsonl", "spikes.jsonl", "plan.json", "slim.json", "samples.json"]
)
@pytest.mark.parametrize("content", ["[1, 2", '{"layers": [{"layer": "x"}], "rows": 3}', "\0\n[]\n3\n", "[" * 100_000])
def test_damaged_files_are_left_out_not_fatal(tmp_path, name, content):
    write_fake_run(tmp_path, layers=2, steps=100)
    (tmp_path / name).write_text(content, encoding="utf-8")
    run = read_run(tmp_path)
    run.model = {}
    Balanced(report._page(run, report._draw(run)))


def test_spikes_stand_with_their_text(page):
    text = Balanced(page).text
    assert "/data/<web>.jsonl:40, /data/<web>.jsonl:41, /data/<web>.jsonl:42, /data/<web>.jsonl:43 and 3 more" in text
    assert "2.5" in text and "3 more are in spikes.jsonl" in text


def test_a_run_without_spikes_and_probes_says_little_of_them(tmp_path):
    write_fake_run(tmp_path, layers=2, steps=100)
    (tmp_path / "spikes.jsonl").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n', encoding="utf-8")
    (tmp_path / "state.json").write_text('{"state": "failed", "error": "step 2: <out> of memory"}', encoding="utf-8")
    text = Balanced(report.write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "Loss spikes" not in text and "No probes: probes.every was not set." in text
    assert "Failed: step 2: <out> of memory" in text


def test_probes_are_curves_by_number(tmp_path):
    rows = [{"step": 0, "recall/4": 0.0, "recall/16": None, "recall/odd": 1.0}, {"step": 5, "recall/4": 0.5}]
    found = probe_series(rows, "recall")
    assert {number: (steps.tolist(), values.tolist()) for number, (steps, values) in found.items()} == {
        4: ([0, 5], [0.0, 0.5])
    }


def test_a_damaged_plan_is_named_with_its_reason(tmp_path):
    plan = json.loads((write_fake_run(tmp_path) / "plan.json").read_text())
    plan["layers"][0]["keep"] = "neither"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run = read_run(tmp_path)
    assert run.plan is None and "keep" in run.notes[0]


def test_not_a_folder(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        report.write_report(tmp_path / "nothing")


def test_a_resumed_run_counts_each_step_once_and_skips_the_torn_line(tmp_path):
    lines = [{"step": step, "loss": loss} for step, loss in ((1, 5.0), (2, 4.0), (2, 3.0), (3, float("nan")))]
    torn = '{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), torn]))
    run = read_run(tmp_path)
    steps, values = series(run.training, "loss")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [5.0, 3.0])
    assert run.notes == ["metrics.jsonl: 1 unreadable line left out"]


def test_alarms_are_gathered_by_layer_and_kind():
    def record(step, *kinds):
        return {"step": step, "layers": [], "alarms": [{"layer": 0, "kind": kind} for kind in kinds]}

    found = alarms([record(10, "stuck"), record(20, "stuck", "silent"), record(30)])
    assert [tuple(alarm.values())[1:] for alarm in found] == [("stuck", 10, 20, 2), ("silent", 20, 20, 1)]


def test_pruned_layers_without_gates_and_many_layers_are_drawn(tmp_path):
    write_fake_run(tmp_path, layers=40, steps=100)
    records = [json.loads(line) for line in (tmp_path / "gates.jsonl").read_text().splitlines()]
    for record in records:
        record["layers"] = [entry for entry in record["layers"] if entry["layer"] % 3]
        record["layers"][0] |= {"histogram": None, "attention_rms": None, "mean": None}
    (tmp_path / "gates.jsonl").write_text("\n".join(map(json.dumps, records)))
    run = read_run(tmp_path)
    assert set(report._draw(run)) == set(sections.FIGURES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (scaled(1_234_567), "1.23 M"),
        (scaled(2.5e9), "2.5 B"),
        (scaled(2.5e9, "B"), "2.5 GB"),
        (scaled(12, "B"), "12 B"),
        (fixed(-0.5, 2), "−0.50"),
        (fixed(0.5, 1, sign=True), "+0.5"),
        (duration(59.6), "1 min 0 s"),
        (duration(7500), "2 h 5 min"),
    ],
)
def test_numbers_as_a_person_writes_them(text, expected):
    assert text == expected
