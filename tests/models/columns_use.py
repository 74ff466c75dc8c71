"""Columns of the contract: the ways a transformers model is used."""

import copy
import tempfile

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fusiontree.models import HybridConfig, HybridLanguageModel
from fusiontree.models.accounting import has_gate
from tests.models.kinds import VOCAB, assert_same, assert_same_gradients, gradients, off, tokens

Model = HybridLanguageModel
LENGTH = 63


def recomputed_is_kept(model: Model) -> None:
    """Checkpointing changes neither logits nor any gradient; the weights are shared, so the model stays as it was."""
    ids, weight = tokens(2, LENGTH), torch.randn(2, LENGTH, VOCAB)
    positions = torch.cat([torch.arange(40), torch.arange(23)])[None]
    model.train()
    try:
        logits = model(ids, position_ids=positions).logits
        want = gradients(model, (logits * weight).sum())
        for what in ("branches", "block"):
            model.config.checkpointing = what
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
            again = model(ids, position_ids=positions).logits
            assert_same(again, logits, 1e-6)
            assert_same_gradients(gradients(model, (again * weight).sum()), want, 1e-6)
            model.gradient_checkpointing_disable()
    finally:
        model.config.checkpointing = "branches"
        model.gradient_checkpointing_disable()
        model.eval()


@torch.no_grad()
def loaded_is_saved(model: Model) -> None:
    ids = tokens(2, LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is HybridLanguageModel
    ours, theirs = model.config.to_dict(), again.config.to_dict()
    written_by_saving = ("dtype", "architectures", "transformers_version", "_name_or_path")
    assert {k: v for k, v in ours.items() if k not in written_by_saving and theirs[k] != v} == {}
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def bf16_is_close(model: Model) -> None:
    """Trained weights are smaller than the table's: with those, rounding would be amplified as in no real model."""
    small = copy.deepcopy(model)
    for name, parameter in small.named_parameters():
        if parameter.ndim > 1 and "conv" not in name:
            parameter.mul_(0.4)
    ids = tokens(2, LENGTH)
    want = small(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = small(ids).logits
    assert got.isfinite().all() and off(got.float(), want) < 0.05
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        cast = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    got = cast(ids).logits
    assert got.dtype == torch.bfloat16 and got.isfinite().all() and off(got.float(), want) < 0.05
    stepped = cast.generate(ids[:, :9], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert stepped.shape == (2, 12)


@torch.no_grad()
def embeddings_are_ids(model: Model) -> None:
    ids = tokens(2, LENGTH)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert_same(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:], 1e-6)
    assert_same(model(ids, logits_to_keep=torch.tensor([2, 40])).logits, model(ids).logits[:, [2, 40]], 1e-6)


@torch.no_grad()
def hidden_states_lead_to_logits(model: Model) -> None:
    ids = tokens(2, LENGTH)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert_same(model.lm_head(out.hidden_states[-1]), out.logits, 1e-6)
    if model.config.position_encoding != "learned" and not model.config.embedding_norm:
        assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert model(ids).hidden_states is None


def labels_give_cross_entropy(model: Model) -> None:
    ids = tokens(2, LENGTH)
    labels = ids.clone()
    labels[0, :20] = -100
    out = model(ids, labels=labels)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_same(out.loss, want)
    counted = model(ids, labels=labels, num_items_in_batch=10).loss
    assert_same(counted, want * (labels[:, 1:] != -100).sum() / 10)


@torch.no_grad()
def greedy_is_argmax_of_whole_forwards(model: Model) -> None:
    ids = tokens(2, 13)
    got = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for _ in range(8):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids)


def gates_are_watched(model: Model) -> None:
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    out = model(ids, attention_mask=mask, output_gates=True)
    assert_same(out.logits, model(ids, attention_mask=mask).logits, 1e-6)
    alone = model(ids[1:, 11:], output_gates=True).gates
    for spec, gate, own, rms in zip(model.config.layer_specs, out.gates, alone, out.branch_rms, strict=True):
        if not has_gate(model.config, spec):
            assert gate is None and rms is None
            continue
        assert gate.shape == (2, LENGTH, model.config.hidden_size) and gate.min() > 0 and gate.max() < 1
        assert gate.requires_grad and not rms.requires_grad and rms.shape == (2,) and (rms > 0).all()
        assert_same(gate[1:, 11:], own)


@torch.no_grad()
def removed_is_cut(model: Model) -> None:
    """Masking a branch equals the model built without it, on the state dict less that branch's names."""
    for branch in ("mamba", "attention"):
        removed = {i: branch for i, spec in enumerate(model.config.layer_specs) if len(spec.mixers) == 2 and i % 2 == 0}
        ids = tokens(2, LENGTH)
        full = model(ids).logits
        with model.branches_removed(removed):
            want = model(ids).logits
            stepped = model.generate(ids[:, :20], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(model(ids).logits, full) and not model.removed_branches
        settings = model.config.to_dict()
        prefixes = []
        for i in removed:
            settings["layers"][i]["mixers"] = [m for m in settings["layers"][i]["mixers"] if m != branch]
            prefixes += [f"model.layers.{i}.mixers.{branch}.", f"model.layers.{i}.alignment.inputs.{branch}."]
            prefixes += [f"model.layers.{i}.cross.", f"model.layers.{i}.joint.branch_norms.{branch}."]
            prefixes += [f"model.layers.{i}.srte."] if branch == "mamba" else []
        cut = HybridLanguageModel(HybridConfig(**settings)).eval()
        cut.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(tuple(prefixes))})
        assert_same(cut(ids).logits, want, 3e-6)
        again = cut.generate(ids[:, :20], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(again, stepped)


COLUMNS = [
    recomputed_is_kept,
    loaded_is_saved,
    bf16_is_close,
    embeddings_are_ids,
    hidden_states_lead_to_logits,
    labels_give_cross_entropy,
    greedy_is_argmax_of_whole_forwards,
    gates_are_watched,
    removed_is_cut,
]
