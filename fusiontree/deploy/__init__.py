"""Prune, export and serve: plans from gates and from measured removal, static export, and the runtime."""

from fusiontree.deploy.apply import apply_plan, cut_branches
from fusiontree.deploy.export import ExportResult, export_model, export_pruned_model, verify_export
from fusiontree.deploy.greedy import make_plan
from fusiontree.deploy.measure import RemovalMeasurement, measure_removal
from fusiontree.deploy.plan import LayerPlan, PrunePlan, load_plan, removals, save_plan
from fusiontree.deploy.progress import console_progress
from fusiontree.deploy.propose import GateObservation, observe_gates, propose_from_gates, read_gate_log
from fusiontree.deploy.requests import Limits, Request
from fusiontree.deploy.runtime import InferenceRuntime
from fusiontree.deploy.sampling import GenerationOptions
from fusiontree.deploy.scheduler import Scheduler
from fusiontree.deploy.session import Session
from fusiontree.models.loading import load_model

__all__ = [
    "ExportResult",
    "GateObservation",
    "GenerationOptions",
    "InferenceRuntime",
    "LayerPlan",
    "Limits",
    "PrunePlan",
    "RemovalMeasurement",
    "Request",
    "Scheduler",
    "Session",
    "apply_plan",
    "console_progress",
    "cut_branches",
    "export_model",
    "export_pruned_model",
    "load_model",
    "load_plan",
    "make_plan",
    "measure_removal",
    "observe_gates",
    "propose_from_gates",
    "read_gate_log",
    "removals",
    "save_plan",
    "verify_export",
]
