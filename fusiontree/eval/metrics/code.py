"""Which line of a model's output is the completion, and when it equals the gold one."""

from __future__ import annotations

MULTILINE = {"python": (('"""', "'''"), ('"""', "'''"), "#"), "java": (("/*",), ("*/",), "//")}


def longbench_line(output: str) -> str:
    """The first line without a backtick, `#` or `//`, after leading line breaks; "" when there is none.

    A blank line is such a line, and so is one that merely holds a `#` in a string not: as LongBench has it.
    """
    for line in output.lstrip("\n").split("\n"):
        if "`" not in line and "#" not in line and "//" not in line:
            return line
    return ""


def repobench_line(output: str, language: str = "python") -> str:
    """The first line that is neither blank nor a comment; the first of all when there is none.

    A comment over several lines starts in a line that begins with its sign and ends in a *later* line that ends with
    it: a one-line \"\"\"docstring\"\"\" opens a comment that may never close, as RepoBench has it.
    """
    starts, ends, single = MULTILINE[language]
    lines = output.lstrip("\n").split("\n")
    inside = False
    for line in lines:
        bare = line.strip()
        if inside:
            inside = not bare.endswith(ends)
        elif bare.startswith(starts):
            inside = True
        elif bare and not bare.startswith(single):
            return line
    return lines[0]


def same_code(answer: str, reference: str) -> float:
    """1 when the two are equal but for the amount of white space between words, else 0."""
    return float(answer.split() == reference.split())
