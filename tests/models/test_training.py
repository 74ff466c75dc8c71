"""What training leans on: dropped branches, decay marks, initial values, recomputation, resized vocabularies."""

import pytest
import torch

from fusiontree.errors import ConfigError, PlanError
from fusiontree.models import HybridConfig, HybridLanguageModel
from tests.models.kinds import BASE, assert_same, build, config_of, shared_model, tokens


def dropped(model: HybridLanguageModel) -> dict[int, str]:
    return model.model._dropped_branches()


def test_branch_dropout_follows_its_seed() -> None:
    model = build("post", num_hidden_layers=8, drop_branch_prob=0.5).train()
    draws = []
    for seed in range(200):
        model.branch_dropout_seed = seed
        first = dropped(model)
        torch.rand(3)  # the default generator has no say
        assert dropped(model) == first
        draws.append(first)
    share = sum(len(d) for d in draws) / (200 * 8)
    mamba = sum(side == "mamba" for d in draws for side in d.values()) / sum(len(d) for d in draws)
    assert 0.45 < share < 0.55 and 0.45 < mamba < 0.55 and len({tuple(d.items()) for d in draws}) > 100
    model.eval()
    assert dropped(model) == {}


def test_branch_dropout_is_the_masked_model() -> None:
    ids = tokens(2, 30)
    model = build("post", num_hidden_layers=4, drop_branch_prob=0.6).train()
    model.branch_dropout_seed = 3
    removed = dropped(model)
    assert removed
    got = model(ids).logits
    model.eval()
    with model.branches_removed(removed):
        assert_same(model(ids).logits, got, 1e-6)
    model.train().branch_dropout_seed = 4
    assert not torch.equal(model(ids).logits, got)
    model.gradient_checkpointing_enable()
    model.branch_dropout_seed = 3
    model(ids).logits.sum().backward()  # recomputed with the decision that was drawn forward


def test_branch_dropout_leaves_single_branches_alone() -> None:
    model = build("pruned", drop_branch_prob=0.9).train()
    assert all(dropped(model) == {} for _ in range(20))


def test_removing_what_is_not_there_is_refused() -> None:
    model = shared_model("pruned")
    for removed, words in (({5: "mamba"}, "layer 5"), ({0: "mamba"}, "no branch"), ({0: "attention"}, "only its")):
        with pytest.raises(PlanError, match=words), model.branches_removed(removed):
            pass
    full = shared_model("post")
    with pytest.raises(RuntimeError), full.branches_removed({0: "mamba"}):
        with full.branches_removed({1: "attention"}):
            assert full.removed_branches == {0: "mamba", 1: "attention"}
        assert full.removed_branches == {0: "mamba"}
        raise RuntimeError
    assert full.removed_branches == {}


def test_decay_is_for_matrices_only() -> None:
    model = HybridLanguageModel(config_of("mixed", srte="learned", srte_shared=False, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or "embed_tokens" in name or "conv_weight" in name or "srte.table" in name
        assert getattr(parameter, "_no_weight_decay", False) == spared, name


def test_initial_values() -> None:
    model = HybridLanguageModel(HybridConfig(**{**BASE, "hidden_size": 256, "num_hidden_layers": 4}))
    values = dict(model.named_parameters())
    mamba, layer = "model.layers.1.mixers.mamba.", "model.layers.1."

    def std(name: str) -> float:
        return values[name].std().item()

    assert std("model.embed_tokens.weight") == pytest.approx(0.02, rel=0.05)
    assert std(layer + "alignment.inputs.mamba.weight") == pytest.approx(0.02, rel=0.05)
    assert std(layer + "fusion_proj.weight") == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert std(layer + "mlp.down_proj.weight") == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert std(mamba + "out_proj.weight") == pytest.approx(0.02, rel=0.05)  # ends in the alignment
    assert std(layer + "gate.U.weight") == pytest.approx(1 / 16, rel=0.1)
    assert std(layer + "gate.D.weight") == pytest.approx(0.02, rel=0.1)
    assert (values[layer + "norm.weight"] == 1).all() and (values[mamba + "D"] == 1).all()
    assert values[mamba + "A_log"].min() >= 0 and values[mamba + "A_log"].max() <= torch.tensor(16.0).log()
    steps = torch.nn.functional.softplus(values[mamba + "dt_bias"])
    assert steps.min() >= 1e-3 * 0.999 and steps.max() <= 0.1001
    gate = model(tokens(1, 20), output_gates=True).gates[0]
    assert (gate - 0.5).abs().max() < 0.05
    wide = HybridLanguageModel(HybridConfig(**{**BASE, "initializer_range": 0.1}))
    assert wide.model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_chunk_size_is_a_matter_of_speed_only() -> None:
    ids = tokens(2, 63)
    with torch.no_grad():
        want = shared_model("post")(ids).logits
        for size in (1, 5, 64, 256):
            assert_same(build("post", mamba_chunk_size=size)(ids).logits, want)


def test_recomputation_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that autograd holds between forward and backward: all > branches > block."""

    def held(model: HybridLanguageModel) -> int:
        seen: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if not isinstance(t, torch.nn.Parameter):
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(tokens(2, 64)).logits.sum()
        return sum(seen.values())

    model = build("post", num_hidden_layers=3).train()
    everything = held(model)
    model.gradient_checkpointing_enable()
    branches = held(model)
    model.config.checkpointing = "block"
    block = held(model)
    assert block < branches < 0.7 * everything


@pytest.mark.parametrize("tied", [True, False])
def test_resized_vocabulary(tied: bool) -> None:
    model = build("post", tie_word_embeddings=tied)
    ids = tokens(1, 9)
    before = model(ids).logits
    model.resize_token_embeddings(80)
    assert model.config.vocab_size == 80 and (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    after = model(ids).logits
    assert after.shape == (1, 9, 80)
    assert_same(after[..., :61], before, 1e-6)
    assert model.model.embed_tokens.weight._no_weight_decay
    assert model(torch.full((1, 3), 79)).logits.isfinite().all()


def test_a_few_steps_learn() -> None:
    torch.manual_seed(0)
    model = HybridLanguageModel(config_of("post")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tokens(2, 33)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("kind", ["srte_learned", "srte_low_rank", "srte_per_layer"])
def test_a_learned_encoding_says_where_it_ends(kind: str) -> None:
    model = build(kind, max_position_embeddings=16)
    with torch.no_grad():
        assert model(tokens(1, 16)).logits.isfinite().all()
        with pytest.raises(ConfigError, match="max_position_embeddings=16"):
            model(tokens(1, 17))
