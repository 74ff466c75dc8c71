"""Weight initialisation, all of it.

parameter                        distribution
embeddings, linear layers        N(0, initializer_range)
projections into the residual    N(0, initializer_range / sqrt(2 · layers)): fusion_proj and the MLP's last of a hybrid
                                 block (its mixers end in the alignment instead), the mixers' and MLP's last elsewhere
gate U                           N(0, 1 / sqrt(H)): with a small U both its factors would learn slowly
gate D                           N(0, initializer_range): the gate starts near 0.5
gate logit (one per layer)       0: the gate starts at 0.5
cross-fusion down                N(0, 1 / sqrt(H)), as gate U
cross-fusion up                  0: a layer starts as it would be without
norm weights                     1; all biases 0
position table                   N(0, initializer_range)
conv weight, bias                U(-1/sqrt(K), 1/sqrt(K))           (PyTorch's default for a depthwise convolution)
A_log                            log U(1, 16) (Mamba-2); log 1 … N in every channel (Mamba-1, S4D-real)
dt_bias                          softplus⁻¹ of log-uniform [1e-3, 0.1]
dt_proj                          U(-1/sqrt(R), 1/sqrt(R))            (Mamba-1)
D                                1
SRTE scale                       0.1; tables as embeddings
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn
from transformers import initialization as init

from fusiontree.models.config import HybridConfig
from fusiontree.models.fusion import GateLowRank, GateOfLayer, LowRank
from fusiontree.models.hybrid_block import HybridBlock
from fusiontree.models.mamba1_block import Mamba1Block
from fusiontree.models.mamba_block import MambaBlock
from fusiontree.models.norms import GatedRMSNorm, LayerNorm, RMSNorm
from fusiontree.models.plain_block import ParallelBlock, SequentialBlock
from fusiontree.models.srte import SRTE

_LAST = ("mixers.attention.o_proj", "mixers.mamba.out_proj", "mlp.down_proj")
_INTO_RESIDUAL: dict[type[nn.Module], tuple[str, ...]] = {
    HybridBlock: ("fusion_proj", "mlp.down_proj"),
    SequentialBlock: _LAST,
    ParallelBlock: _LAST,
}
_EXPERT = re.compile(r"^mlp\.experts\.\d+\.")  # each expert ends as the MLP in its place would
_DT_MIN, _DT_MAX = 1e-3, 0.1


def init_module(module: nn.Module, config: HybridConfig) -> None:
    """Initialise the module's own parameters, as the table says. Called for every module, inner ones first."""
    std = config.initializer_range
    if isinstance(module, (nn.Linear, nn.Embedding)):
        init.normal_(module.weight, mean=0.0, std=std)
    if isinstance(module, (RMSNorm, GatedRMSNorm, LayerNorm)):
        init.ones_(module.weight)
    if isinstance(module, (nn.Linear, LayerNorm)) and module.bias is not None:
        init.zeros_(module.bias)
    if isinstance(module, SRTE) and module.kind == "sincos":
        init.constant_(module.scale, 0.1)
    if isinstance(module, GateLowRank):
        init.normal_(module.U.weight, mean=0.0, std=1 / math.sqrt(config.hidden_size))
    if isinstance(module, GateOfLayer):
        init.zeros_(module.logit)
    if isinstance(module, LowRank):
        init.normal_(module.down.weight, mean=0.0, std=1 / math.sqrt(config.hidden_size))
        init.zeros_(module.up.weight)
    if isinstance(module, MambaBlock):
        _init_convolution(module)
        init.copy_(module.A_log, torch.empty(module.heads).uniform_(1, 16).log())
        _init_steps(module, module.heads)
    if isinstance(module, Mamba1Block):
        _init_convolution(module)
        init.copy_(module.A_log, torch.arange(1.0, 1 + module.A_log.shape[1]).log().expand(module.inner, -1))
        _init_steps(module, module.inner)
        bound = 1 / math.sqrt(module.dt_proj.in_features)
        init.uniform_(module.dt_proj.weight, -bound, bound)
    inner = dict(module.named_modules())
    names = _INTO_RESIDUAL.get(type(module), ())
    for name in (name for name in inner if _EXPERT.sub("mlp.", name) in names):
        init.normal_(inner[name].weight, mean=0.0, std=std / math.sqrt(2 * config.num_hidden_layers))


def _init_convolution(module: MambaBlock | Mamba1Block) -> None:
    bound = 1 / math.sqrt(module.conv_weight.shape[1])
    init.uniform_(module.conv_weight, -bound, bound)
    init.uniform_(module.conv_bias, -bound, bound)
    init.ones_(module.D)


def _init_steps(module: MambaBlock | Mamba1Block, heads: int) -> None:
    dt = torch.exp(torch.empty(heads).uniform_(math.log(_DT_MIN), math.log(_DT_MAX)))
    init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))


def mark_no_weight_decay(model: nn.Module) -> None:
    """Set `_no_weight_decay` on every parameter that decay (and Muon) must leave alone: all but weight matrices."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in embeddings or name.endswith(("conv_weight", "A_log")):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
