"""The stack of blocks that the config's layer list describes, from embeddings to hidden states.

Shapes: B batch, L tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusiontree.models.block import LayerOutput
from fusiontree.models.cache import HybridCache
from fusiontree.models.config import HybridConfig
from fusiontree.models.experts import Routing
from fusiontree.models.hybrid_block import build_block
from fusiontree.models.init import init_module
from fusiontree.models.inputs import described, valid_tokens
from fusiontree.models.local_global_attn import head_groups
from fusiontree.models.norms import build_norm
from fusiontree.models.positions import Positions, RotaryTable, alibi_slopes
from fusiontree.models.segments import Progress, Rows, Segments, lay_out, normal_order
from fusiontree.models.srte import SRTE, check_reach, check_table
from fusiontree.ops.attention import remember_mask
from fusiontree.ops.autocast import autocast_dtype


@dataclass
class Stacked:
    """What the stack returns."""

    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None
    outputs: list[LayerOutput]
    document_starts: Tensor | None  # (B, L) bool

    def restore(self, back: Tensor) -> None:
        """From padding-first to the caller's order of tokens; back (B, L) says where each is now."""

        def moved(t: Tensor) -> Tensor:
            return t.gather(1, back if t.ndim == 2 else back[..., None].expand_as(t))

        self.hidden = moved(self.hidden)
        if self.hidden_states is not None:
            self.hidden_states = tuple(moved(h) for h in self.hidden_states)
        self.outputs = [
            out._replace(
                gate=None if out.gate is None else moved(out.gate),
                routing=None if out.routing is None else Routing(*map(moved, out.routing)),
            )
            for out in self.outputs
        ]
        if self.document_starts is not None:
            self.document_starts = moved(self.document_starts)


class HybridPreTrainedModel(PreTrainedModel):
    config_class = HybridConfig
    config: HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["HybridBlock", "SequentialBlock", "ParallelBlock"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict: ClassVar = ["A_log", "dt_bias", r"mamba\.D"]  # not the gate, whose D is a matrix

    def _init_weights(self, module: nn.Module) -> None:
        init_module(module, self.config)

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # transformers passes over modules without parameters of their own when the model is not one of its own, and so
        # over what `init_module` does to their children. Loaded parameters are left alone by `init_module` itself.
        super()._initialize_weights(module)


class HybridModel(HybridPreTrainedModel):
    """Embedding, blocks and final norm: token ids to hidden states."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        specs = config.layer_specs
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        encoded = config.srte != "none" and any("mamba" in spec.mixers and spec.block == "hybrid" for spec in specs)
        self.srte = SRTE(config) if encoded and config.srte_shared else None
        self.rotary = RotaryTable(config)
        self.has_time = encoded
        learned = config.position_encoding == "learned"
        self.position_table = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.embedding_norm = build_norm(config) if config.embedding_norm else None
        attending = [spec for spec in specs if "attention" in spec.mixers]
        self.groups = list(dict.fromkeys(group for spec in attending for group in head_groups(config, spec)))
        self.layers = nn.ModuleList(build_block(config, spec) for spec in specs)
        # A post-normed block already ends in a norm.
        self.norm = None if config.norm_placement == "post" else build_norm(config)
        self.gradient_checkpointing = False
        self.removed_branches: dict[int, str] = {}
        self.branch_dropout_seed: int | None = None
        self.post_init()

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        keep_hidden: bool = False,
        watch: bool = False,
    ) -> Stacked:
        """inputs_embeds (B, L, H); attention_mask (B, past + L), 0 at padding anywhere; position_ids (B, L) restart at
        0 at each document; seq_idx (B, L) names documents. A warm `past_key_values` is continued and advanced."""
        x, (batch, length) = inputs_embeds, inputs_embeds.shape[:2]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        valid = valid_tokens(attention_mask, batch, length, past)
        position_ids = described("position_ids", position_ids, batch, length)
        rows = Rows((batch, length), x.device, valid, position_ids, described("seq_idx", seq_idx, batch, length))
        order = None if valid is None else normal_order(valid)
        if order is not None:
            x = x.gather(1, order[..., None].expand_as(x))
            rows = rows.map(lambda t: t.gather(1, order), length)
        positions, segments = self._lay_out(x, rows, past_key_values, order is not None)
        x = self._embed_positions(x, positions)
        x, hidden_states, outputs = self._run_layers(x, positions, segments, past_key_values, keep_hidden, watch)
        stack = Stacked(x, hidden_states, outputs, segments.starts)
        if order is not None:
            stack.restore(torch.argsort(order, dim=1))
        return stack

    def _run_layers(
        self,
        x: Tensor,
        positions: Positions,
        segments: Segments,
        cache: HybridCache | None,
        keep_hidden: bool,
        watch: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, list[LayerOutput]]:
        removed = {**self._dropped_branches(), **self.removed_branches}
        # A cache would be written a second time by the recomputation.
        recomputes = self.gradient_checkpointing and self.training and cache is None
        kept = [x] if keep_hidden else None
        outputs = []
        for i, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            arguments = (x, positions, segments, layer_cache, removed.get(i))
            if recomputes and self.config.checkpointing == "block":
                out = torch.utils.checkpoint.checkpoint(block, *arguments, watch=watch, use_reentrant=False)
            else:
                out = block(*arguments, recompute_branches=recomputes, watch=watch)
            x = out.hidden
            outputs.append(out)
            if kept is not None:
                kept.append(x)
        if self.norm is not None:
            x = self.norm(x)
        if kept is not None:
            kept[-1] = x  # transformers' convention: the last one is what the head sees
        return x, None if kept is None else tuple(kept), outputs

    def _lay_out(self, x: Tensor, rows: Rows, cache: HybridCache | None, moved: bool) -> tuple[Positions, Segments]:
        """`moved`: the rows' tokens do not stand in the caller's order."""
        past = Progress() if cache is None else cache.progress
        if past.age is not None and past.age.shape[0] != rows.shape[0]:
            raise ValueError(f"past_key_values holds {past.age.shape[0]} rows, the input has {rows.shape[0]}")
        ids, segments, after = lay_out(rows, past)
        if cache is not None:
            cache.advance(after, partial(_progress_after, rows, past, segments.pads, moved))
        longest = past.seen + rows.shape[1]
        if rows.position_ids is not None:
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0:
                raise ValueError(f"position_ids must not be negative; the smallest is {low}")
            longest = max(longest, high + 1)
        positions = Positions(ids)
        if any(group.position == "rope" for group in self.groups):
            positions.rotary = self.rotary.lookup(ids, longest, autocast_dtype(x))
        if self.has_time:
            check_reach(self.config, longest)
        if self.position_table is not None:
            check_table(self.config, longest)
        for group in self.groups:
            if group.position == "alibi":
                positions.slopes[len(group.heads)] = alibi_slopes(len(group.heads), ids.device)
        if self.srte is not None:
            positions.srte = self.srte(ids)
        if cache is None:
            self._remember_masks(positions, segments, x)
        return positions, segments

    def _embed_positions(self, x: Tensor, positions: Positions) -> Tensor:
        if self.position_table is not None:
            x = x + self.position_table(positions.ids).to(x.dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _remember_masks(self, positions: Positions, segments: Segments, x: Tensor) -> None:
        """Build what the layers share before they run: one that is compiled or computed again must not add to it."""
        for heads, window, position in self.groups:
            slopes = positions.slopes[len(heads)] if position == "alibi" else None
            remember_mask(segments.masks, x.shape[1], window, segments.reach, autocast_dtype(x), x.device, slopes)

    def _dropped_branches(self) -> dict[int, str]:
        """Which branch each layer does without in this training step; one draw per step, the same on every rank."""
        probability = self.config.drop_branch_prob
        if not self.training or probability == 0.0:
            return {}
        generator = None
        if self.branch_dropout_seed is not None:
            generator = torch.Generator().manual_seed(self.branch_dropout_seed)
        draws = torch.rand(len(self.layers), 2, generator=generator).tolist()
        return {
            i: "mamba" if side < 0.5 else "attention"
            for i, (drop, side) in enumerate(draws)
            if drop < probability and len(self.config.layer_specs[i].mixers) == 2
        }


def _progress_after(rows: Rows, past: Progress, pads: Tensor | None, moved: bool, kept: int) -> Progress:
    """Where the rows stood had only the first `kept` tokens come; refused where these are not the caller's first."""
    warm = past.age is not None
    if (moved and kept) or (warm and pads is not None and int(pads.max()) > kept):
        raise ValueError("cannot take back tokens of a forward whose padding is among or behind them")
    return lay_out(rows.map(lambda t: t[:, :kept], kept), past)[2] if kept else past
