"""Static export: an ordinary checkpoint folder of the pruned model, proved equal to the masked original first."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusiontree.deploy.apply import apply_plan
from fusiontree.deploy.files import check_replaceable, new_folder, write_json
from fusiontree.deploy.fingerprint import model_fingerprint
from fusiontree.deploy.loading import copy_tokenizer_files
from fusiontree.deploy.plan import load_plan, removals, save_plan
from fusiontree.errors import CheckpointError
from fusiontree.models.loading import check_model_folder, load_model, weight_files

EXPORT_MARK = "export.json"
PLAN_COPY = "prune_plan.json"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportResult:
    """What an export did.

    `relative_error` is max |pruned - masked original| / max |masked original| over the logits, in fp32.
    """

    path: Path
    removed: dict[int, str]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    relative_error: float


def export_pruned_model(
    model_path: str | Path, prune_plan_path: str | Path, output_path: str | Path, *, seed: int = 0
) -> ExportResult:
    """Write the model without the branches its plan takes out to `output_path`, tokenizer included.

    The folder appears only when complete and when its logits on random tokens equal those of the original with the same
    branches masked, to a relative error of 1e-4 in fp32. A folder that is not an earlier export is never overwritten.
    """
    plan = load_plan(prune_plan_path)
    source = check_model_folder(model_path)
    output = _checked_output(Path(output_path), source)
    original = load_model(source)
    removed = removals(plan, original)
    pruned = apply_plan(original, plan)
    counts = original.num_parameters(), pruned.num_parameters()
    with new_folder(output, EXPORT_MARK, CheckpointError) as folder:
        pruned.save_pretrained(folder)
        copy_tokenizer_files(source, folder)
        save_plan(plan, folder / PLAN_COPY)
        error = verify_export(original, load_model(folder), removed, seed)
        result = ExportResult(output, dict(removed), *counts, _file_bytes(source), _file_bytes(folder), error)
        record = {
            **dataclasses.asdict(result),
            "path": output.name,
            "source_fingerprint": model_fingerprint(original),
            "fingerprint": model_fingerprint(pruned),
            "format": "fusiontree-export",
            "version": 1,
        }
        write_json(folder / EXPORT_MARK, record, CheckpointError)
    return result


def export_model(model_path: str | Path, output_path: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write a checkpoint as a model folder of its own: weights, config and tokenizer, nothing of the training.

    `dtype`: of the weights; None: as they are. Read back and compared before the folder appears.
    """
    source = check_model_folder(model_path)
    output = _checked_output(Path(output_path), source)
    model = load_model(source, dtype=dtype)
    with new_folder(output, EXPORT_MARK, CheckpointError) as folder:
        model.save_pretrained(folder)
        copy_tokenizer_files(source, folder)
        written = load_model(folder, dtype=dtype).state_dict()
        for name, tensor in model.state_dict().items():
            if not torch.equal(tensor, written[name]):
                raise CheckpointError(f"{output}: {name} was not written as it is; not exported")
        record = {"format": "fusiontree-export", "version": 1, "fingerprint": model_fingerprint(model)}
        write_json(folder / EXPORT_MARK, record, CheckpointError)
    return output


def verify_export(
    original: Any, pruned: Any, removed: Mapping[int, str], seed: int = 0, tolerance: float = TOLERANCE
) -> float:
    """Relative error of `pruned` against `original` with `removed` masked, on random tokens; leaves both in fp32.

    CheckpointError when it is above `tolerance`.
    """
    original, pruned = original.float().eval(), pruned.float().eval()
    length = min(64, original.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(original.config.vocab_size, (2, length), generator=generator).to(original.device)
    with torch.no_grad():
        with original.branches_removed(dict(removed)):
            wanted = original(tokens, use_cache=False).logits
        got = pruned(tokens, use_cache=False).logits
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not error <= tolerance:  # also catches NaN
        raise CheckpointError(
            f"the pruned model differs from the masked original by {error:.2e}, "
            f"at most {tolerance:.0e} is allowed; not exported"
        )
    return error


def _checked_output(output: Path, source: Path) -> Path:
    check_replaceable(output, EXPORT_MARK, CheckpointError)
    here, there = output.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(
            f"{output}: the export needs a folder of its own, not {source} or one around or inside it"
        )
    return output


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))
