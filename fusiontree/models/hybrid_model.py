"""`HybridLanguageModel`: a stack of blocks described by the config's layer list, as a transformers
causal language model.

Shapes: B batch, L tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput, can_return_tuple

from fusiontree.errors import PlanError
from fusiontree.models.cache import HybridCache
from fusiontree.models.config import HybridConfig
from fusiontree.models.experts import Routing
from fusiontree.models.init import mark_no_weight_decay
from fusiontree.models.inputs import check_labels, check_tokens, described, valid_tokens
from fusiontree.models.linear import LMHead
from fusiontree.models.stack import HybridModel, HybridPreTrainedModel, Stacked


@dataclass
class HybridOutput(ModelOutput):
    """Output of `HybridLanguageModel`; see its `forward`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: HybridCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    gates: tuple[Tensor | None, ...] | None = None
    branch_rms: tuple[Tensor | None, ...] | None = None
    routing: tuple[Routing | None, ...] | None = None


class HybridLanguageModel(HybridPreTrainedModel, GenerationMixin):
    """A causal language model of FusionTree blocks (or any layer list); use it as any transformers model."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.post_init()
        mark_no_weight_decay(self)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the loaded parameters, which are new objects, are marked for the optimizer again."""
        loaded = super().from_pretrained(*args, **kwargs)
        mark_no_weight_decay(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_gates: bool = False,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> HybridOutput:
        """Logits, and with `labels` the mean cross entropy over labels that are not -100.

        input_ids (B, L) or inputs_embeds (B, L, H). attention_mask (B, past + L): padding on either side or between.
        Packed rows: position_ids (B, L) restart at 0 at each document (or seq_idx names them): nothing crosses, neither
        attention nor states nor the loss. labels (B, L) are unshifted. With `output_gates`, `gates` holds each layer's
        gate (B, L, H) with its gradient, 1 all Mamba and 0 all attention, None where a layer has one branch;
        `branch_rms` the detached root mean square (2,) of each branch's output. `routing`: of mixtures of experts, each
        layer's probabilities (B, L, E) and choices (B, L, k). logits_to_keep: only the last n logits.
        skip_logits: with `labels`, compute the loss without the logits ever standing in memory; `logits` is then None.
        """
        check_tokens(input_ids, inputs_embeds)
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: attention weights are never formed; use output_gates to look inside")
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        cache = self._cache_for(past_key_values, use_cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        watched = bool(output_hidden_states) or output_gates or labels is not None
        if torch.is_grad_enabled() or watched or inputs_embeds.shape[1] <= piece_length(inputs_embeds):
            stack = self.model(
                inputs_embeds, attention_mask, position_ids, seq_idx, cache, bool(output_hidden_states), output_gates
            )
        else:
            stack = self._in_pieces(inputs_embeds, attention_mask, position_ids, seq_idx, cache)
        loss = logits = None
        if labels is not None:
            check_labels(labels, *inputs_embeds.shape[:2])
            if not skip_logits and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError("labels need the logits of every token: leave logits_to_keep out, or set skip_logits")
        if not (skip_logits and labels is not None):
            rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(stack.hidden[:, rows])
        if labels is not None:
            loss = self._loss(stack, logits, labels, kwargs.get("num_items_in_batch"))
        return HybridOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=stack.hidden_states,
            gates=tuple(out.gate for out in stack.outputs) if output_gates else None,
            branch_rms=tuple(out.branch_rms for out in stack.outputs) if output_gates else None,
            routing=tuple(out.routing for out in stack.outputs) if self.config.num_experts > 1 else None,
        )

    def _in_pieces(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        cache: HybridCache | None,
    ) -> Stacked:
        """A long text that needs no gradient, piece by piece through the cache: the same numbers, bounded memory."""
        cache = HybridCache(self.config) if cache is None else cache
        rows, length = x.shape[:2]
        valid = valid_tokens(attention_mask, rows, length, cache.progress.seen)
        position_ids, seq_idx = (
            described(name, t, rows, length) for name, t in (("position_ids", position_ids), ("seq_idx", seq_idx))
        )
        hidden = []
        for begin in range(0, length, piece_length(x)):
            piece = slice(begin, begin + piece_length(x))
            mask, ids, documents = (None if t is None else t[:, piece] for t in (valid, position_ids, seq_idx))
            hidden.append(self.model(x[:, piece], mask, ids, documents, cache).hidden)
        return Stacked(torch.cat(hidden, dim=1), None, [], None)

    def _loss(self, stack: Stacked, logits: Tensor | None, labels: Tensor, count: Any) -> Tensor:
        """Mean cross entropy of each token given those before it, never across the start of a document."""
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        if stack.document_starts is not None:
            targets = targets.masked_fill(F.pad(stack.document_starts[:, 1:], (0, 1)), -100)
        targets = targets.flatten()
        if logits is None:
            total = self.lm_head(stack.hidden.flatten(0, 1), targets)
        else:
            total = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")
        return total / ((targets != -100).sum().clamp_min(1) if count is None else count)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """transformers resizes a head into a plain linear layer: ours takes over its weight."""
        weight = new_embeddings.weight
        with torch.device("meta"):
            self.lm_head = LMHead(weight.shape[1], weight.shape[0])
        self.lm_head.weight = weight

    @property
    def removed_branches(self) -> dict[int, str]:
        """Layer index → branch that is masked now."""
        return self.model.removed_branches

    @contextmanager
    def branches_removed(self, removed: dict[int, str]) -> Iterator[None]:
        """Within the context the named branches output zero, all else as it is: what an export without them does."""
        specs = self.config.layer_specs
        for i, branch in removed.items():
            if not 0 <= i < len(specs) or branch not in specs[i].mixers:
                raise PlanError(f"layer {i} has no branch {branch!r} to remove; the model has {len(specs)} layers")
            if len(specs[i].mixers) == 1:
                raise PlanError(f"layer {i} has only its {branch} branch left; at least one must stay")
        before = self.model.removed_branches
        self.model.removed_branches = {**before, **removed}
        try:
            yield
        finally:
            self.model.removed_branches = before

    @property
    def branch_dropout_seed(self) -> int | None:
        """Seed of the next steps' branch dropout; None draws from torch's default generator."""
        return self.model.branch_dropout_seed

    @branch_dropout_seed.setter
    def branch_dropout_seed(self, seed: int | None) -> None:
        self.model.branch_dropout_seed = seed

    def _cache_for(self, cache: Cache | None, use_cache: bool | None) -> HybridCache | None:
        if cache is None:
            wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
            recomputes = self.model.gradient_checkpointing and self.training
            return HybridCache(self.config) if wanted and not recomputes else None
        if not isinstance(cache, HybridCache):
            if cache.get_seq_length() > 0:
                raise TypeError(f"past_key_values must be a HybridCache, not a filled {type(cache).__name__}")
            return HybridCache(self.config)
        if len(cache.layers) != len(self.model.layers):
            raise ValueError(f"past_key_values has {len(cache.layers)} layers, the model {len(self.model.layers)}")
        return cache

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind!r}: this model keeps a HybridCache of its own; leave it out")
        if generation_config.use_cache is False and model_kwargs.get("past_key_values") is None:
            return
        cache = model_kwargs["past_key_values"] = self._cache_for(model_kwargs.get("past_key_values"), True)
        if generation_config.is_assistant and cache is not None:
            cache.activate_past_recording()  # its guesses are taken back where the main model disagrees

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Parameters lose what is marked on them when a model is pickled or deep-copied."""
        super().__setstate__(state)
        mark_no_weight_decay(self)


def piece_length(x: Tensor) -> int:
    """Tokens that one pass over x (B, L, H) takes at once when no gradient is wanted."""
    # Past a few thousand tokens a CPU spends its time on fetching fresh memory for every intermediate result.
    return max(512, 2048 // max(1, x.shape[0])) if x.device.type == "cpu" else 32768


AutoConfig.register("fusiontree", HybridConfig)
AutoModelForCausalLM.register(HybridConfig, HybridLanguageModel)
