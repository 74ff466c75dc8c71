"""Cross-file completion out of any folder of source files."""

from fusiontree.eval.tasks.codebase.task import FAMILY, Codebase

__all__ = ["FAMILY", "Codebase"]
