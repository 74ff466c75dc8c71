"""What taking a branch out of a layer saves."""

import copy
from typing import Any, NamedTuple

from fusiontree.deploy.plan import BRANCHES, Branch
from fusiontree.models.accounting import account


class Saving(NamedTuple):
    """Bytes of weights, and forward FLOPs per token, that are no longer there."""

    bytes: int
    flops_per_token: int


def branch_prefixes(layer: int, branch: str) -> tuple[str, ...]:
    """The state-dict prefixes that go with one branch of one layer: its own, and the glances, which need both."""
    here = f"model.layers.{layer}."
    own = (f"mixers.{branch}.", f"alignment.inputs.{branch}.", f"joint.branch_norms.{branch}.", "cross.")
    prefixes = tuple(here + name for name in own)
    # A layer's own time encoding feeds Mamba only.
    return (*prefixes, f"{here}srte.") if branch == "mamba" else prefixes


def cut_config(config: Any, removed: dict[int, Branch]) -> Any:
    """A copy of `config` whose layers lack the removed branches."""
    result = copy.deepcopy(config)
    for index, branch in removed.items():
        layer = result.layers[index]
        layer["mixers"] = [name for name in layer["mixers"] if name != branch]
    return result


def branch_savings(model: Any) -> dict[tuple[int, Branch], Saving]:
    """(layer, branch) → saving, for every branch that has a neighbour and so could be taken out."""
    full = account(model.config).flops_per_token
    savings: dict[tuple[int, Branch], Saving] = {}
    for index, layer in enumerate(model.config.layers):
        for branch in BRANCHES if len(layer["mixers"]) > 1 else ():
            prefixes = branch_prefixes(index, branch)
            size = sum(
                p.numel() * p.element_size() for name, p in model.named_parameters() if name.startswith(prefixes)
            )
            flops = full - account(cut_config(model.config, {index: branch})).flops_per_token
            savings[index, branch] = Saving(size, max(0, int(flops)))
    return savings
