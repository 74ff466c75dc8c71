"""The contract on any checkpoint: however a text is fed to a model, its logits are the same."""

from fusiontree.eval.verify.contract import LINES, Finding, Line, find_lines, verify
from fusiontree.eval.verify.error import relative_error
from fusiontree.eval.verify.specimen import Specimen
from fusiontree.eval.verify.table import contract_table

__all__ = [
    "LINES",
    "Finding",
    "Line",
    "Specimen",
    "contract_table",
    "find_lines",
    "relative_error",
    "verify",
]
