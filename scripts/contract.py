"""Holds tiny random models, ours and those of transformers, against the contract; writes docs/contract.md.

python scripts/contract.py --measure  examines them and keeps what was found in docs/contract.json (a minute)
python scripts/contract.py --write    puts the tables made of that file into the document, between its markers
python scripts/contract.py            prints the tables
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tables import main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, RECORD = ROOT / "docs" / "contract.md", ROOT / "docs" / "contract.json"
LENGTH, VOCABULARY = 97, 127
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
BAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
STATES: dict[str, Any] = {"mamba_head_dim": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
OURS: dict[str, Any] = {**SIZES, **STATES, "num_attention_heads": 4}


def theirs(name: str, **settings: Any) -> Any:
    """A model of transformers."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**settings)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(transformers, kind)(config)


def ours(name: str, **settings: Any) -> Any:
    """A model of FusionTree."""
    from fusiontree.models import HybridLanguageModel, preset

    return HybridLanguageModel(preset(name, **{**OURS, **settings}))


MODELS: dict[str, Callable[[], Any]] = {
    "FusionTree": lambda: ours("fusiontree", sliding_window=9, gate_rank=8),
    "FusionTree pre + cross": lambda: ours(
        "fusiontree", sliding_window=9, gate_rank=8, norm_placement="pre", cross_rank=4, num_key_value_heads=2
    ),
    "our llama": lambda: ours("llama", num_key_value_heads=2),
    "our mamba2": lambda: ours("mamba2"),
    "Falcon-H1": lambda: theirs("FalconH1", **SIZES, **HEADS, **BAMBA, mamba_d_ssm=64, head_dim=8),
    "Bamba": lambda: theirs("Bamba", **SIZES, **HEADS, **BAMBA, attn_layer_indices=[1]),
    "Jamba": lambda: theirs(
        "Jamba", **SIZES, **HEADS, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=4, mamba_d_state=8, mamba_dt_rank=4,
    ),
    "Mamba-2": lambda: theirs(
        "Mamba2", **SIZES, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16, expand=2
    ),
    "Mamba": lambda: theirs("Mamba", **SIZES, state_size=8, expand=2, time_step_rank=4),
    "Llama": lambda: theirs("Llama", **SIZES, **HEADS),
    "GPT-2": lambda: theirs("GPT2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256),
}  # fmt: skip


def drawn(model: Any, seed: int = 1) -> Any:
    """Large random weights everywhere, so that nothing hides behind a zero or a one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith((".D", "scale")):
                parameter.normal_(1.0, 0.2, generator=generator)
            elif name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
                parameter.normal_(0.0, 1.0, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


def measured() -> dict[str, Any]:
    """Every model against every line."""
    import torch

    from fusiontree.deploy import cut_branches
    from fusiontree.eval.journal import finite
    from fusiontree.eval.provenance import provenance
    from fusiontree.eval.verify import Specimen, verify

    ids = torch.randint(1, VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        found[name] = [asdict(each) for each in verify(Specimen(drawn(make()), ids, cut_branches))]
        broken = [each["name"] for each in found[name] if each["status"] == "broken"]
        print(f"{name}: {', '.join(broken) or 'nothing'} broken", flush=True)
    result: dict[str, Any] = finite({"length": LENGTH, "provenance": provenance(torch.device("cpu")), "models": found})
    return result


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def holds_table() -> Iterator[str]:
    """Lines down, models across: the error of what holds, **what is broken**, – for what is not offered."""
    models = record()["models"]
    yield f"| line | {' | '.join(models)} |"
    yield f"|---|{'---:|' * len(models)}"
    for line in zip(*models.values(), strict=True):
        yield f"| `{line[0]['name']}` | {' | '.join(map(cell, line))} |"


def cell(found: dict[str, Any]) -> str:
    if found["status"] == "not offered":
        return "–"
    error = "fails" if found["error"] is None else f"{found['error']:.1e}" if found["error"] else "0"
    return f"**{error}**" if found["status"] == "broken" else error


def claims_table() -> Iterator[str]:
    """What each line means."""
    yield "| line | what is compared | allowed |"
    yield "|---|---|---:|"
    for found in next(iter(record()["models"].values())):
        sign = "≥" if found["at_least"] else "≤"
        yield f"| `{found['name']}` | {found['claim']} | {sign} {found['tolerance']:.0e} |"


def reasons_table() -> Iterator[str]:
    """Why a line is not offered, or how it failed."""
    yield "| reason | line: models |"
    yield "|---|---|"
    reasons: dict[str, dict[str, list[str]]] = {}
    for model, findings in record()["models"].items():
        for found in findings:
            if found["note"]:
                reasons.setdefault(found["note"], {}).setdefault(found["name"], []).append(model)
    for note, lines in reasons.items():
        where = "; ".join(f"`{line}`: {', '.join(models)}" for line, models in lines.items())
        yield f"| {note} | {where} |"


def origin() -> Iterator[str]:
    """Where the numbers come from."""
    found = record()
    versions, machine = found["provenance"]["versions"], found["provenance"]["machine"]
    yield (
        f"torch {versions['torch']}, transformers {versions['transformers']}, {machine['cpu']}, {machine['device']}, "
        f"{found['length']} tokens, commit {found['provenance']['commit']}, {found['provenance']['date'][:10]}, "
        "`python scripts/contract.py --measure`."
    )


if __name__ == "__main__":
    if "--measure" in sys.argv[1:]:
        RECORD.write_text(json.dumps(measured(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        main(DOCUMENT, {"claims": claims_table, "origin": origin, "holds": holds_table, "reasons": reasons_table})
