"""Python files: what each defines, what it imports from the others, and where it first uses that."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath

from fusiontree.eval.tasks.codebase.source import Definition, Use, snippet, usable

Definitions = dict[str, Definition]  # by name


class PythonFiles:
    """The Python files of a folder, parsed when they are first needed. `files`: path below `root` -> text."""

    def __init__(self, files: Mapping[str, str], root: Path) -> None:
        self.files = files
        self.names = {path: _module_names(path, root) for path in files}
        self.modules = {name: path for path in sorted(files, reverse=True) for name in self.names[path]}
        self.tree = cache(lambda path: _parsed(files[path]))
        self.defined = cache(self._defined)

    def uses(self, path: str) -> list[Use]:
        """First uses in this file of names that another one defines, in the order of its lines."""
        tree = self.tree(path)
        if tree is None:
            return []
        names, body = self._imported(path, tree)
        lines = self.files[path].split("\n")
        first: dict[Definition, int] = {}
        for node in ast.walk(tree) if names else ():
            meant = _meant(node, names)
            if meant is not None and (line := getattr(node, "lineno", 0) - 1) >= body and usable(lines[line]):
                first[meant] = min(first.get(meant, line), line)
        found = sorted(first.items(), key=lambda item: (item[1], item[0].path, item[0].name))
        return [Use(path, line, body, each, tuple(o for o, _ in found if o != each)) for each, line in found]

    def _defined(self, path: str) -> Definitions:
        tree = self.tree(path)
        return _definitions(path, tree, self.files[path].split("\n")) if tree is not None else {}

    def _imported(self, path: str, tree: ast.Module) -> tuple[dict[str, Definition | Definitions], int]:
        """(local name -> what it means, or a module's definitions; index of the first line after the imports)."""
        names: dict[str, Definition | Definitions] = {}
        body = 0
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                body = node.end_lineno or node.lineno
                for alias in node.names:
                    meant = self._stands_for(path, node, alias.name)
                    local = alias.asname or alias.name
                    if meant is not None and "." not in local:
                        names[local] = meant
        return names, body

    def _stands_for(self, path: str, node: ast.Import | ast.ImportFrom, name: str) -> Definition | Definitions | None:
        """What an imported name is: something another file defines, another file's definitions, or not of here."""
        if isinstance(node, ast.ImportFrom):
            base = self._base(path, node)
            place = self.modules.get(base)
            if place not in (None, path) and name in self.defined(place):
                found: Definition = self.defined(place)[name]
                return found
            name = f"{base}.{name}" if base else name
        place = self.modules.get(name)
        return self.defined(place) if place not in (None, path) else None

    def _base(self, path: str, node: ast.ImportFrom) -> str:
        """The absolute name of the module after `from`."""
        if not node.level:
            return node.module or ""
        own = max(self.names[path], key=len, default="").split(".")
        package = own if path.endswith("__init__.py") else own[:-1]
        kept = package[: len(package) - node.level + 1]
        return ".".join([*kept, *([node.module] if node.module else [])])


def _parsed(text: str) -> ast.Module | None:
    """The tree; None for a file that this Python does not understand (another version's, a template)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _definitions(path: str, tree: ast.Module, lines: list[str]) -> Definitions:
    """Functions, classes and constants at the top of a module."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names, start = [node.name], min([node.lineno, *(each.lineno for each in node.decorator_list)])
        elif isinstance(node, ast.Assign):
            names, start = [each.id for each in node.targets if isinstance(each, ast.Name)], node.lineno
        else:
            continue
        text = snippet(lines, start - 1, node.end_lineno or start)
        found.update({name: Definition(path, name, text) for name in names})
    return found


def _module_names(path: str, root: Path) -> list[str]:
    """What the file is imported as: by its place below the folder, and by its place in its own package.

    The package may begin above the folder (the folder is inside one) or below it (`src/`).
    """
    parts = list(PurePosixPath(path).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    folder = root
    above: list[str] = []
    while (folder / "__init__.py").is_file():
        above.insert(0, folder.name)
        folder = folder.parent
    start = 0
    while start < len(parts) - 1 and not root.joinpath(*parts[: start + 1], "__init__.py").is_file():
        start += 1
    names = [".".join([*above, *parts]), ".".join(parts[start:])]
    return [name for name in dict.fromkeys(names) if name]


def _meant(node: ast.AST, names: Mapping[str, Definition | Definitions]) -> Definition | None:
    """What another file defines and this name, or attribute of an imported module, stands for."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        meant = names.get(node.id)
        return meant if isinstance(meant, Definition) else None
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        module = names.get(node.value.id)
        return module.get(node.attr) if isinstance(module, dict) else None
    return None
