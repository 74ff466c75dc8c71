from pathlib import Path

import pytest

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.run import evaluate
from fusiontree.eval.task import Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.codebase.generic import OtherFiles
from fusiontree.eval.tasks.codebase.python import PythonFiles
from fusiontree.eval.tasks.codebase.source import source_files
from fusiontree.eval.tasks.codebase.task import Codebase, chosen_uses, corpus_folder
from tests.eval.subjects import subject

SHAPES = '''"""Shapes."""

import math as _math

SIDES = 4


@staticmethod
def area(width, height):
    """Of a rectangle."""
    return width * height


class Square:
    def grow(self):
        return area(1, 1)
'''
USER = '''"""Uses shapes."""

import os
from . import shapes
from .shapes import Square as Box, area
from pkg.deep.tool import helper


def run(folder):
    # area is in a comment
    size = area(2, 3)
    again = area(4, 5)
    box = Box(size, shapes.SIDES)
    return os.path.join(folder, helper(box, again))
'''


def text(length=8192):
    return TokenText(byte_tokenizer(), length)


@pytest.fixture
def folder(tmp_path):
    files = {
        "pkg/__init__.py": "",
        "pkg/shapes.py": SHAPES,
        "pkg/user.py": USER,
        "pkg/deep/__init__.py": "",
        "pkg/deep/tool.py": "def helper(box, again):\n    return repr(box)\n",
        "pkg/broken.py": "from pkg.shapes import area\nprint 'area', area(1, 2)\n",
        "tests/test_user.py": "from pkg.user import run\n\nprint(run('somewhere'))\n",
    }
    for name, content in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "project"


def uses_of(root, path):
    files = source_files(root)
    return [(use.line, use.defined.path, use.defined.name) for use in PythonFiles(files, root).uses(path)]


def test_the_first_use_of_each_imported_name(folder):
    lines = USER.split("\n")
    assert uses_of(folder, "pkg/user.py") == [
        (lines.index("    size = area(2, 3)"), "pkg/shapes.py", "area"),
        (lines.index("    box = Box(size, shapes.SIDES)"), "pkg/shapes.py", "SIDES"),
        (lines.index("    box = Box(size, shapes.SIDES)"), "pkg/shapes.py", "Square"),
        (lines.index("    return os.path.join(folder, helper(box, again))"), "pkg/deep/tool.py", "helper"),
    ]
    assert uses_of(folder, "pkg/shapes.py") == []  # its own names are no others'
    assert uses_of(folder, "pkg/broken.py") == []  # not this Python's


def test_a_folder_inside_a_package_knows_its_own_name(folder):
    assert ("pkg/shapes.py", "area") in {use[1:] for use in uses_of(folder, "pkg/user.py")}
    inner = uses_of(folder / "pkg", "user.py")
    assert {use[1:] for use in inner} == {
        ("shapes.py", "area"), ("shapes.py", "SIDES"), ("shapes.py", "Square"), ("deep/tool.py", "helper"),
    }  # fmt: skip


def test_tests_and_foreign_encodings_are_left_out(folder):
    (folder / "latin.py").write_bytes("x = 'é'\n".encode("latin-1"))
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.py").write_text("x = 1\n")
    (folder / "notes.txt").write_text("no source\n")
    source_files.cache_clear()
    assert sorted(source_files(folder)) == [
        "pkg/__init__.py", "pkg/broken.py", "pkg/deep/__init__.py", "pkg/deep/tool.py", "pkg/shapes.py", "pkg/user.py",
    ]  # fmt: skip


def test_the_prompt_has_the_definition_and_the_file_up_to_the_line(folder):
    settings = TaskSettings(data=folder)
    cross = {sample.id: sample for sample in Codebase("cross_file").samples(text(), settings)}
    alone = {sample.id: sample for sample in Codebase("in_file").samples(text(), settings)}
    assert cross.keys() == alone.keys()
    sample = next(sample for sample in cross.values() if sample.facts["name"] == "area")
    before = USER.split("    size =")[0]
    assert alone[sample.id].prompt == "# Path: pkg/user.py\n" + before
    assert sample.prompt.endswith(alone[sample.id].prompt)
    snippet = '# Path: pkg/shapes.py\n@staticmethod\ndef area(width, height):\n    """Of a rectangle."""\n'
    assert snippet in sample.prompt
    assert "class Square" in sample.prompt  # another name that the file uses
    assert sample.references == ("    size = area(2, 3)",)
    assert sample.id == "pkg/user.py:11@8192"
    assert sample.facts["defined in"] == "pkg/shapes.py"


def test_prompts_fit_their_length_and_keep_the_definition(folder):
    (folder / "pkg" / "user.py").write_text(USER.replace("    size =", "    filler = 1\n" * 100 + "    size ="))
    source_files.cache_clear()
    lengths = (400, 800)
    settings = TaskSettings(data=folder, lengths=lengths)
    for setting in ("cross_file", "in_file"):
        samples = list(Codebase(setting).samples(text(), settings))
        assert {sample.facts["length"] for sample in samples} == set(lengths)
        for sample in samples:
            assert len(sample.prompt) <= sample.facts["length"] - 128
            assert sample.prompt.endswith("\n")
            if setting == "cross_file":
                assert "Path: " + sample.facts["defined in"] in sample.prompt
    with pytest.raises(ConfigError, match="--lengths 9000: the model sees no more than 8192"):
        next(Codebase("in_file").samples(text(), TaskSettings(data=folder, lengths=(9000,))))
    with pytest.raises(ConfigError, match="--lengths 128: 128 tokens of them are the answer's"):
        next(Codebase("in_file").samples(text(), TaskSettings(data=folder, lengths=(128,))))


def test_a_line_is_asked_for_once_and_the_seed_gives_the_order(folder):
    (folder / "pkg" / "twin.py").write_text(USER)
    source_files.cache_clear()
    orders = [[(use.path, use.line) for use in chosen_uses(folder, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    files = source_files(folder)
    lines = [files[path].split("\n")[line] for path, line in orders[0]]
    assert len(lines) == len(set(lines))
    assert len({tuple(chosen_uses(folder, seed)) for seed in range(5)}) > 1


def test_scores(folder):
    task = Codebase("cross_file")
    samples = [s for s in task.samples(text(), TaskSettings(data=folder)) if s.facts["name"] in ("area", "helper")]
    outputs = {"area": "\n# the size\n    size  = area(2, 3)\nmore", "helper": ""}
    found = task.summarise([Scored(s, out := outputs[s.facts["name"]], task.score(s, out)) for s in samples])
    assert found["metrics"]["exact_match"] == 50.0
    assert found["metrics"]["8192/edit_similarity"] == 49.0  # 98 (one blank more) and 0


def test_other_languages():
    files = {
        "src/shapes.ts": "export function area(w: int, h: int) {\n  return w * h;\n}\n\nexport const SIDES = 4;\n",
        "src/user.ts": "import { area } from './shapes';\n\n// area()\nconst size = area(2, 3);\nconst n = SIDES;\n",
        "Foo.java": "public class Widget {\n    int size;\n}\n",
        "Bar.java": "import org.Widget;\n\nclass Bar {\n    Widget w = new Widget();\n}\n",
        "alone.go": "func nothing() {\n}\n",
    }
    others = OtherFiles(files)
    (use, _) = others.uses("src/user.ts")
    assert (use.line, use.body, use.defined.name) == (3, 1, "area")
    assert use.defined.text == "export function area(w: int, h: int) {\n  return w * h;\n}"
    assert [each.name for each in use.others] == ["SIDES"]
    (use,) = others.uses("Bar.java")
    assert use.line == 3
    assert others.uses("alone.go") == []


def test_a_folder_of_another_language_is_asked_with_its_comment_sign(tmp_path):
    (tmp_path / "shapes.ts").write_text("export function area(w, h) {\n  return w * h;\n}\n")
    (tmp_path / "user.ts").write_text("import { area } from './shapes';\n\nconst size = area(2, 3);\n")
    (sample,) = Codebase("cross_file").samples(text(), TaskSettings(data=tmp_path))
    assert sample.prompt.startswith("// Path: shapes.ts\nexport function")
    assert Codebase("cross_file").score(sample, "// so\nconst size = area(2, 3);")["exact_match"] == 1.0


def test_folders_without_questions_are_named(tmp_path):
    with pytest.raises(DataError, match=r"has no source files; read are \.py"):
        next(Codebase("in_file").samples(text(), TaskSettings(data=tmp_path)))
    (tmp_path / "a.py").write_text("x = 1\n")
    source_files.cache_clear()
    with pytest.raises(DataError, match="none of its 1 source files uses a name that another one defines"):
        next(Codebase("in_file").samples(text(), TaskSettings(data=tmp_path)))
    with pytest.raises(DataError, match="is not a folder"):
        next(Codebase("in_file").samples(text(), TaskSettings(data=tmp_path / "a.py")))


def test_the_standard_library_is_the_default():
    samples = list(Codebase("cross_file").samples(text(1024), TaskSettings(limit=5)))
    assert corpus_folder(Path("stdlib")) == corpus_folder(None)
    assert len({sample.facts["file"] for sample in samples}) == 5
    for sample in samples:
        assert sample.facts["name"] in sample.references[0]
        assert len(sample.prompt.encode()) <= 1024 - 128


def test_a_model_is_asked_and_scored(folder, tmp_path):
    settings = TaskSettings(data=folder, limit=2)
    tasks = [Codebase("cross_file"), Codebase("in_file")]
    outcome = evaluate(subject("hybrid", 256), tasks, settings, tmp_path / "out")
    assert not outcome.failed
    assert outcome.results["codebase:in_file"]["samples"] == 2
