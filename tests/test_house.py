"""The house rules that a machine can check: import arrows, optional packages, sizes, documents that tell the truth."""

import ast
import re
import subprocess
import sys
from dataclasses import fields as fields_of
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fusiontree"

# Which rooms each room may import from (DESIGN: imports run one way). `errors` may be imported by all.
BASE = {"ops", "models", "data"}
MAY_IMPORT = {
    "errors": set(),
    "ops": set(),
    "models": {"ops"},
    "data": set(),
    "train": BASE,
    "eval": BASE,
    "deploy": BASE,
    "lab": BASE | {"train", "eval", "deploy"},
    "recipes": BASE | {"train", "eval", "deploy", "lab"},
    "cli": BASE | {"train", "eval", "deploy", "lab", "recipes"},
    "__init__": {"models", "deploy"},
    "__main__": {"cli"},
}
OPTIONAL = [
    "matplotlib",
    "tensorboard",
    "wandb",
    "datasets",
    "pyarrow",
    "fla",
    "triton",
    "deepspeed",
    "lm_eval",
    "jieba",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "bm25s",
]

# About an optional package, and imported only where it is there.
ADAPTERS = ("fusiontree.lab.canvas", "fusiontree.lab.plots", "fusiontree.lab.grid.plots", "fusiontree.deploy.server.")

READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
DOCUMENTS = sorted([*READMES, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from; `from fusiontree import X` counts as `models`, whose names it re-exports."""
    package = ("fusiontree", *path.relative_to(PACKAGE).parent.parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (parent, node.module or "") if part)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "fusiontree" else [base]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fusiontree" and len(parts) > 1:
                rooms.add(parts[1] if parts[1] in MAY_IMPORT else "models")
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{path} stands in no room of the house: {sorted(MAY_IMPORT)}"
    wrong = imported_rooms(path) - MAY_IMPORT[room] - {room, "errors"}
    assert not wrong, f"{room} must not import {sorted(wrong)}; allowed: {sorted(MAY_IMPORT[room])}"


def test_the_arrow_test_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    module = tmp_path / "data" / "bad.py"
    module.write_text(
        "import fusiontree.train.engine\nfrom fusiontree import HybridConfig\nfrom fusiontree import eval as e\n"
        "from ..deploy import prune\nfrom .. import lab\nfrom . import loader\n"
        "def f():\n    from fusiontree.ops import ssd\n"
    )
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert imported_rooms(module) == {"train", "models", "eval", "deploy", "lab", "data", "ops"}


def test_everything_imports_without_the_optional_packages() -> None:
    modules = [".".join(("fusiontree", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in MODULES]
    modules = [name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]
    modules = [name for name in modules if not name.startswith(ADAPTERS)]
    code = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        f"for name in {modules}:\n    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_files_stay_readable_in_one_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): n for path in MODULES if (n := len(path.read_text("utf-8").splitlines())) > 400
    }
    assert not long


def test_no_pickles() -> None:
    """A pickle is code: weights are safetensors, everything else is JSON."""
    pattern = re.compile(r"\btorch\.load\(|\btorch\.save\(|\bimport pickle\b|\bjoblib\b|weights_only=False")
    assert not [str(path) for path in MODULES if pattern.search(path.read_text("utf-8"))]


def code_blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """Every command line of the shell blocks, continuation lines joined, comments dropped, split at blanks."""
    text = "\n".join(block for language, block in code_blocks(path) if language in ("bash", "sh", "console"))
    lines = [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line.split() for line in lines if line and not line.startswith("#")]


def verb_named(words: list[str]) -> tuple[object, list[str]]:
    """The command object that `fusiontree WORDS` calls, and what is left for it."""
    from fusiontree.cli.main import app

    command = typer.main.get_command(app)
    while words and getattr(command, "commands", None):
        assert words[0] in command.commands, f"no such verb: {words[0]}; there are {sorted(command.commands)}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_documents_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    for words in commands(path):
        if words[0] == "make":
            assert words[1] in targets, " ".join(words)
        if words[0] == "fusiontree" or words[:3] == ["python", "-m", "fusiontree"]:
            command, rest = verb_named(words[1:] if words[0] == "fusiontree" else words[3:])
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            unknown = [word for word in rest if re.match(r"--[a-z]", word) and word.split("=")[0] not in known]
            assert not unknown, f"{' '.join(words)}: {unknown} not in {sorted(known)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_the_documents_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text) for link in link
    ]
    named = re.findall(r"(?<![\w/.-])((?:configs|docs|scripts|benchmarks|fusiontree|tests)/[\w./-]*\w)", text)
    missing = [link for link in links if link and "://" not in link and not (path.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_the_documents_imports_what_exists(path: Path) -> None:
    for language, block in code_blocks(path):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fusiontree":
                module = __import__(node.module, fromlist=["_"])
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {missing}"


def test_both_readmes_have_the_same_shape() -> None:
    english, chinese = (path.read_text("utf-8") for path in READMES)
    assert code_blocks(READMES[0]) == code_blocks(READMES[1])
    without_code = [re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL) for text in (english, chinese)]
    levels = [[len(hashes) for hashes in re.findall(r"^(#+) ", text, flags=re.MULTILINE)] for text in without_code]
    assert levels[0] == levels[1]
    links = [sorted(set(re.findall(r"\]\(([^)#\s]+)", text))) for text in without_code]
    swapped = [sorted({"README" if "README" in link else link for link in group}) for group in links]
    assert swapped[0] == swapped[1]


def test_every_shipped_config_is_named_in_the_readme() -> None:
    readme = READMES[0].read_text("utf-8")
    assert not [path.name for path in (ROOT / "configs").glob("*.yaml") if path.name not in readme]


def test_every_gate_alarm_has_a_section_with_advice() -> None:
    kinds = re.findall(r'"kind": "(\w+)"', (PACKAGE / "train" / "gate_monitor.py").read_text("utf-8"))
    sections = re.findall(r"^### (\w+)$", (ROOT / "docs" / "gates.md").read_text("utf-8"), flags=re.MULTILINE)
    assert kinds and sorted(kinds) == sorted(sections)


def test_settings_named_in_the_documents_exist() -> None:
    from fusiontree import HybridConfig
    from fusiontree.train.config import RunConfig

    model_keys = [field.name for field in fields_of(HybridConfig)]

    for path in DOCUMENTS:
        for name in re.findall(
            r"`((?:training|gate_monitor|probes|logging|system|model)\.[a-z_.]+)`", path.read_text("utf-8")
        ):
            section, _, rest = name.partition(".")
            fields = RunConfig.model_fields[section].annotation.model_fields if section != "model" else None
            for key in rest.split("."):
                assert key in (fields if fields is not None else model_keys), f"{path.name}: {name}"
                fields = getattr(fields[key].annotation, "model_fields", {}) if fields is not None else {}
