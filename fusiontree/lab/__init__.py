"""The laboratory: comparing models, and reports that a person likes to read."""

from fusiontree.lab.report import write_report

__all__ = ["write_report"]
