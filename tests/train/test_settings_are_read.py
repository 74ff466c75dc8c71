"""Every setting changes something: each is varied on a small run and a difference must be seen."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from fusiontree.data import DataConfig
from fusiontree.errors import ConfigError
from fusiontree.train import build, train
from fusiontree.train.config import MODEL_ARGUMENTS, RunConfig, parse_config
from tests.train.tiny import lines, state_hashes, tiny_content

# field -> (another value, settings that both runs share so that the field matters)
SEEN_IN_THE_RUN: dict[str, tuple[Any, dict[str, Any]]] = {
    "training.steps": (5, {}),
    "training.sequence_length": (24, {}),
    "training.micro_batch_size": (3, {}),
    "training.accumulation_steps": (1, {}),
    "training.curriculum": ([[16, 2], [32, 2]], {}),
    "training.optimizer": ("muon", {}),
    "training.lr": (5e-3, {}),
    "training.min_lr_ratio": (0.9, {}),
    "training.warmup_steps": (1, {}),
    "training.schedule": ("linear", {}),
    "training.decay_fraction": (0.9, {"training__schedule": "wsd"}),
    "training.weight_decay": (0.5, {}),
    "training.beta1": (0.5, {}),
    "training.beta2": (0.5, {}),
    "training.eps": (1e-2, {}),
    "training.muon_momentum": (0.5, {"training__optimizer": "muon"}),
    "training.max_grad_norm": (1e-3, {}),
    "training.precision": ("bf16", {"model__drop_branch_prob": 0.0}),
    "training.save_every": (1, {}),
    "training.save_total_limit": (1, {}),
    "training.validation_every": (1, {}),
    "training.validation_batches": (1, {}),
    "training.loss.balance_weight": (1.0, {"training__loss": {"balance_target": 0.9}}),
    "training.loss.balance_target": (0.9, {"training__loss": {"balance_weight": 1.0}}),
    "training.loss.balance_margin": (0.0, {"training__loss": {"balance_weight": 1.0}}),
    "training.loss.entropy_weight": (1.0, {}),
    "training.loss.sharpen_weight": (1.0, {}),
    "training.loss.specialise_after": (0.0, {"training__loss": {"balance_weight": 1.0, "balance_target": 0.9}}),
    "training.loss.router_weight": (1.0, {"model__num_experts": 3}),
    "training.loss.distill_weight": (2.0, {"training__loss": {"distill_weight": 1.0}}),
    "training.loss.distill_temperature": (5.0, {"training__loss": {"distill_weight": 1.0}}),
    "data.tokenizer": ({"train_vocab_size": 300}, {}),
    "gate_monitor.enabled": (False, {}),
    "gate_monitor.every": (1, {}),
    "gate_monitor.sample_every": (2, {}),
    "gate_monitor.sample_tokens": (5, {}),
    "gate_monitor.decay": (0.9, {}),
    "gate_monitor.token_classes": (False, {}),
    "gate_monitor.alarm_after": (1.0, {"gate_monitor__stuck_width": 0.5}),
    "gate_monitor.stuck_width": (0.0, {}),
    "gate_monitor.collapse_margin": (0.5, {"gate_monitor__stuck_width": 0.0}),
    "gate_monitor.silent_ratio": (1.0, {"gate_monitor__stuck_width": 0.0}),
    "logging.every": (3, {}),
    "logging.tensorboard": (True, {}),
    "system.run_dir": ("elsewhere", {}),
    "system.seed": (7, {}),
}
SEEN_ELSEWHERE = {
    "training.max_skipped_steps",  # test_engine: bad steps can be skipped
    "training.spike_factor",  # test_spikes
    "training.spike_stop",
    "probes.every",  # test_probes, here and in recipes
    "probes.perplexity_lengths",
    "probes.perplexity_tokens",
    "probes.recall_pairs",
    "probes.recall_questions",
    "training.compile",
    "training.activation_checkpointing",
    "logging.console",
    "logging.wandb",
    "logging.wandb_project",
    "system.device",
    "system.threads",
    "system.engine",  # test_engines, with those below
    "system.deepspeed",
    "system.offload",
    "system.timeout",
    "training.teacher",
}


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all settings but those of the model and data rooms, which test their own."""
    names = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and name != "tokenizer":
            names += leaves(inner, f"{prefix}{name}.")
        elif f"{prefix}{name}" != "model" and not (prefix == "data." and name in DataConfig.model_fields):
            names.append(prefix + name)
    return names


def signature(folder: Path, content: dict[str, Any]) -> Any:
    """All that a run leaves behind, but for times."""
    run = folder / content["system"]["run_dir"]
    content["system"]["run_dir"] = str(run)
    config = parse_config(content)
    distills = config.training.loss.distill_weight > 0
    vocab = {**content, "model": {**content["model"], "vocab_size": 258}, "system": {"seed": 1}}
    train(config, teacher=build.build_model(parse_config(vocab)) if distills else None)
    kinds = sorted(path.relative_to(folder).parts[:2] for path in run.iterdir())
    return lines(run), lines(run, "gates.jsonl"), state_hashes(run), kinds


def merged(content: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    *sections, key = name.split(".")
    node = content
    for section in sections:
        node = node.setdefault(section, {})
    node[key] = value
    return content


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    """Four steps, with gates that differ enough to be told apart."""
    folder.mkdir(parents=True, exist_ok=True)
    base = {"training__steps": 4, "training__save_every": 2, "training__validation_every": 2, "system__run_dir": "run"}
    return tiny_content(folder, **deepcopy({**base, **changes}))


def test_the_table_names_every_setting() -> None:
    assert set(SEEN_IN_THE_RUN) | SEEN_ELSEWHERE == set(leaves(RunConfig))


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Signatures of the runs to compare with, made once per set of shared settings."""
    made: dict[str, Any] = {}

    def baseline(shared: dict[str, Any]) -> Any:
        key = repr(shared)
        if key not in made:
            folder = tmp_path_factory.mktemp("base")
            made[key] = signature(folder, small(folder, **shared))
        return made[key]

    return baseline


@pytest.mark.parametrize("name", SEEN_IN_THE_RUN)
def test_a_setting_changes_the_run(tmp_path: Path, baselines: Any, name: str) -> None:
    value, shared = SEEN_IN_THE_RUN[name]
    changed = signature(tmp_path, merged(small(tmp_path, **shared), name, value))
    assert changed != baselines(shared)


def test_the_same_settings_leave_the_same_behind(tmp_path: Path, baselines: Any) -> None:
    """Without this, the test above would prove nothing."""
    assert signature(tmp_path, small(tmp_path)) == baselines({})


def test_compile_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr("fusiontree.train.engine.compile_blocks", compiled.append)
    signature(tmp_path, merged(small(tmp_path), "training.compile", True))
    assert len(compiled) == 1


@pytest.mark.parametrize(("mode", "flag"), [("none", False), ("branches", True), ("block", True)])
def test_activation_checkpointing_reaches_the_model(tmp_path: Path, mode: str, flag: bool) -> None:
    content = merged(small(tmp_path), "training.activation_checkpointing", mode)
    model = build.build_model(parse_config(merged(content, "model.vocab_size", 258)))
    content["system"]["run_dir"] = str(tmp_path / "run")
    train(parse_config(content), model=model)
    assert model.model.gradient_checkpointing is flag
    assert not flag or model.config.checkpointing == mode


@pytest.mark.parametrize(("mode", "speaks"), [("off", False), ("plain", True), ("auto", True)])
def test_the_console_speaks_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, speaks: bool) -> None:
    signature(tmp_path, merged(small(tmp_path), "logging.console", mode))
    assert ("step 4/4  loss" in capsys.readouterr().out) is speaks


def test_wandb_gets_the_figures_under_its_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    run = SimpleNamespace(id="1", log=lambda values, step: logged.append((step, values)), finish=lambda exit_code: None)
    asked: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kw: asked.update(kw) or run))
    monkeypatch.setattr(build, "_require", lambda package, setting: None)
    content = merged(merged(small(tmp_path), "logging.wandb", True), "logging.wandb_project", "mine")
    signature(tmp_path, content)
    assert asked["project"] == "mine" and asked["config"]["training"]["steps"] == 4
    assert [step for step, values in logged if "loss" in values] == [1, 2, 3, 4]


def test_the_device_is_chosen() -> None:
    assert build.choose_device("cpu").type == "cpu"
    assert build.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cuda"):
            build.choose_device("cuda")


def test_threads_are_set(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        signature(tmp_path, merged(small(tmp_path), "system.threads", 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


MODEL: dict[str, tuple[Any, dict[str, Any]]] = {
    "vocab_size": (300, {}),
    "hidden_size": (64, {}),
    "num_hidden_layers": (1, {}),
    "num_attention_heads": (4, {}),
    "num_key_value_heads": (1, {}),
    "head_dim": (8, {}),
    "sliding_window": (3, {}),
    "global_heads": (0, {}),
    "rope_theta": (100.0, {}),
    "rope_scaling": ("linear", {"rope_factor": 2.0}),
    "rope_factor": (4.0, {"rope_scaling": "ntk"}),
    "max_position_embeddings": (64, {"srte": "learned"}),
    "mamba_d_state": (16, {}),
    "mamba_d_conv": (2, {}),
    "mamba_expand": (1.0, {}),
    "mamba_head_dim": (32, {}),
    "mamba_n_groups": (2, {}),
    "mamba_chunk_size": (8, {}),
    "mamba_dt_limit": ([0.05, 0.06], {}),
    "srte": ("none", {}),
    "srte_rank": (4, {"srte": "low_rank"}),
    "srte_shared": (False, {}),
    "gate_rank": (8, {}),
    "gate_granularity": ("head", {}),
    "cross_rank": (2, {}),
    "window_growth": (2, {}),
    "norm_placement": ("pre", {}),
    "norm_eps": (0.1, {}),
    "mlp_type": ("swiglu", {}),
    "intermediate_size": (48, {}),
    "hidden_act": ("relu", {}),
    "drop_branch_prob": (0.9, {}),
    "layers": ([{"mixers": ["mamba"]}, {}], {}),
    "block": ("sequential", {"mixers": ["attention"]}),
    "position_encoding": ("alibi", {}),
    "global_position_encoding": ("none", {}),
    "rope_original_length": (8, {"rope_scaling": "yarn", "rope_factor": 4.0}),
    "mamba_type": ("mamba1", {}),
    "mamba_dt_rank": (3, {"mamba_type": "mamba1"}),
    "fusion_rule": ("sum", {}),
    "alignment": (False, {}),
    "norm_type": ("layer", {}),
    "attention_bias": (True, {}),
    "mlp_bias": (True, {}),
    "embedding_norm": (True, {}),
    "num_experts": (3, {}),
    "experts_per_token": (2, {"num_experts": 3}),
    "parallel_norms": (2, {"block": "parallel", "mixers": ["attention"], "norm_placement": "pre"}),
    "mixers": (["attention"], {}),
    "tie_word_embeddings": (False, {}),
    "initializer_range": (0.1, {}),
    "use_cache": (False, {}),
    "pad_token_id": (7, {}),
    "bos_token_id": (7, {}),
    "eos_token_id": (7, {}),
}


def model_signature(folder: Path, section: dict[str, Any]) -> Any:
    """Shapes, logits in training, whether a cache comes back, special ids, and the chunk length (numbers stay)."""
    content = small(folder)
    content["model"] = {**content["model"], "vocab_size": 258, "drop_branch_prob": 0.0, **section}
    model = build.build_model(parse_config(content))
    model.model.branch_dropout_seed = 3
    ids = torch.arange(48).view(2, 24)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    logits = model.train()(ids, labels=ids).logits.flatten().tolist()
    config = model.config
    cached = model.eval()(ids).past_key_values is None
    special = [config.pad_token_id, config.bos_token_id, config.eos_token_id, config.mamba_chunk_size]
    return shapes, logits, cached, special


def test_the_model_table_names_every_argument() -> None:
    assert set(MODEL) == set(MODEL_ARGUMENTS)


@pytest.mark.parametrize("name", MODEL)
def test_a_model_setting_changes_the_model(tmp_path: Path, name: str) -> None:
    value, shared = MODEL[name]
    assert model_signature(tmp_path, {**shared, name: value}) != model_signature(tmp_path, shared)
