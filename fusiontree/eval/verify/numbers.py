"""Lines about the weights: written and read, cut, rounded, and moved to another device."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch

from fusiontree.eval.verify.error import ModelFailedError, NotOfferedError, relative_error
from fusiontree.eval.verify.specimen import Specimen, fitted
from fusiontree.models.hybrid_model import HybridLanguageModel


def saved(specimen: Specimen) -> float:
    """Written with `save_pretrained` and read with `from_pretrained`."""
    ids = specimen.ids[:2]
    return relative_error(Specimen(_reloaded(specimen, torch.float32), ids).whole(ids), specimen.whole(ids))


def pruned(specimen: Specimen) -> float:
    """Branches taken out of every layer that has two, by turns, against the model with those branches masked."""
    model, ids = specimen.model, specimen.ids[:2]
    if not isinstance(model, HybridLanguageModel):
        raise NotOfferedError("has no branches to take out")
    if specimen.cut is None:
        raise NotOfferedError("no export was handed in")
    layers = [i for i, spec in enumerate(model.config.layer_specs) if len(spec.mixers) == 2]
    if not layers:
        raise NotOfferedError("every layer has one branch already")
    worst = 0.0
    for turn in range(2):
        removed = {layer: ("mamba", "attention")[(i + turn) % 2] for i, layer in enumerate(layers)}
        cut = Specimen(specimen.cut(model, removed), ids)
        with model.branches_removed(removed):
            want = specimen.whole(ids)
        worst = max(worst, relative_error(cut.whole(ids), want))
    return worst


def rounded(specimen: Specimen) -> float:
    """Loaded in bf16, against fp32: the root mean square of the difference, relative to that of the logits.

    Not the largest: one token that a mixture sends to another expert is no fault of the model.
    """
    ids = specimen.ids[:2]
    got, want = Specimen(_reloaded(specimen, torch.bfloat16), ids).whole(ids).double(), specimen.whole(ids).double()
    error = ((got - want).square().mean() / want.square().mean().clamp_min(1e-30)).sqrt()
    return float("inf") if error.isnan() else error.item()


def moved(specimen: Specimen) -> float:
    """On the GPU, against the CPU."""
    if not torch.cuda.is_available():
        raise NotOfferedError("torch sees no GPU here")
    ids = specimen.ids[:2]
    there = "cpu" if specimen.device.type == "cuda" else "cuda"
    twin = Specimen(copy.deepcopy(specimen.model).to(there), ids)
    sizes = fitted([specimen.length // 2] + [1] * specimen.length, specimen.length)
    stepped = relative_error(twin.feed(twin.ids, sizes)[0], specimen.feed(ids, sizes)[0])
    return max(relative_error(twin.whole(twin.ids), specimen.whole(ids)), stepped)


def _reloaded(specimen: Specimen, dtype: torch.dtype) -> Any:
    """The model as `from_pretrained` makes it of what `save_pretrained` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            specimen.model.save_pretrained(folder)
            again = type(specimen.model).from_pretrained(folder, dtype=dtype, local_files_only=True)
        except Exception as error:  # whatever a model of someone else's raises is a finding about it
            said = str(error).partition("\n")[0]
            raise ModelFailedError(f"cannot be saved and loaded: {type(error).__name__}: {said}") from error
    return again.to(specimen.device).eval()
