"""Training: a run from a config, exact to resume, with the gates watched."""

from fusiontree.train.callbacks import Callback, Snapshot
from fusiontree.train.checkpoint import latest_checkpoint
from fusiontree.train.config import RunConfig, load_config
from fusiontree.train.engine import train
from fusiontree.train.gate_monitor import GateMonitor
from fusiontree.train.losses import HybridModelLoss
from fusiontree.train.run_state import RunResult

__all__ = [
    "Callback",
    "GateMonitor",
    "HybridModelLoss",
    "RunConfig",
    "RunResult",
    "Snapshot",
    "latest_checkpoint",
    "load_config",
    "train",
]
