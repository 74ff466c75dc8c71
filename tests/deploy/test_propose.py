"""Gate statistics propose; too few steps, or no gate, propose nothing."""

import json
from pathlib import Path

import pytest
import torch

from fusiontree.deploy.plan import removals
from fusiontree.deploy.propose import GateObservation, observe_gates, propose_from_gates, read_gate_log
from fusiontree.errors import PlanError
from tests.deploy.tiny import tiny_model


def record(step: int, *means: float | None) -> str:
    return json.dumps({"step": step, "layers": [{"layer": i, "mean": m} for i, m in enumerate(means)], "alarms": []})


def test_the_limits_decide() -> None:
    model = tiny_model(num_hidden_layers=4)
    plan = propose_from_gates(model, GateObservation({0: 0.81, 1: 0.19, 2: 0.8}, steps=100))
    assert [entry.keep for entry in plan.layers] == ["mamba", "attention", "both", "both"]
    assert "0.810 is above 0.8" in plan.layers[0].why
    assert plan.layers[3].why == "no gate was observed"
    assert (
        plan.layers[0].bytes_saved > 0 and plan.layers[0].flops_saved_per_token > 0 and plan.layers[2].bytes_saved == 0
    )
    assert plan.predicted_loss is None
    assert removals(plan, model) == {0: "attention", 1: "mamba"}


def test_too_few_steps_keep_both() -> None:
    plan = propose_from_gates(tiny_model(), GateObservation({0: 0.99, 1: 0.01}, steps=99))
    assert {entry.keep for entry in plan.layers} == {"both"}
    assert "observed for 99 steps; 100 are needed" in plan.layers[0].why


def test_the_log_is_averaged_over_its_last_records_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "gates.jsonl"
    lines = [record(10, 0.0, None), record(20, 0.4, None), record(30, 0.6, None)]
    path.write_text("\n".join(lines) + '\n{"step": 40, "lay')
    observation = read_gate_log(path, window=2)
    assert observation.steps == 30
    assert observation.means == {0: pytest.approx(0.5)}


@pytest.mark.parametrize(
    "text", ["", "[]\n", '{"step": 1}\n', record(5, 7.0) + "\n", '{"step": 1, "layers": 3}\n', "x\n"]
)
def test_a_file_that_is_no_gate_log_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gates.jsonl"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"gates\.jsonl"):
        read_gate_log(path)


def test_observed_means_are_those_of_the_gates_and_padding_does_not_count() -> None:
    model = tiny_model()
    ids = torch.randint(0, 256, (1, 12))
    alone = observe_gates(model, [{"input_ids": ids}])
    with torch.no_grad():
        gates = model(ids, output_gates=True).gates
    assert alone.steps == 1
    assert alone.means == {i: pytest.approx(float(gate.mean()), abs=1e-6) for i, gate in enumerate(gates)}
    padded = torch.cat([torch.full((1, 5), 256), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    with_padding = observe_gates(model, [{"input_ids": padded, "attention_mask": mask}])
    assert with_padding.means == {i: pytest.approx(mean, abs=1e-5) for i, mean in alone.means.items()}


def test_nothing_observed_and_wrong_limits_are_refused() -> None:
    with pytest.raises(PlanError, match="no text"):
        observe_gates(tiny_model(), [])
    with pytest.raises(PlanError, match="low < high"):
        propose_from_gates(tiny_model(), GateObservation({}, 1000), high=0.2, low=0.8)
