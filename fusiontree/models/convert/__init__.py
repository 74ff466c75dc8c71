"""Weights of transformers' models in ours, and back: the same logits.

A family names what the other form has and this one lacks, and refuses it, rather than dropping it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusiontree.errors import ConfigError
from fusiontree.models.config import HybridConfig
from fusiontree.models.convert.family import Family, settings_that_matter
from fusiontree.models.convert.mamba_families import MAMBAS
from fusiontree.models.convert.transformer_families import TRANSFORMERS
from fusiontree.models.convert.weights import Place, Same, Tensors
from fusiontree.models.hybrid_model import HybridLanguageModel

FAMILIES: dict[str, Family] = {**TRANSFORMERS, **MAMBAS}

__all__ = ["FAMILIES", "from_transformers", "to_transformers"]


def from_transformers(model: PreTrainedModel) -> HybridLanguageModel:
    """A causal language model of one of `FAMILIES` as ours; ConfigError for forms that ours lacks."""
    family = _family(model.config.model_type)
    config = family.ours(model.config)
    theirs = {name: t.detach() for name, t in model.state_dict().items()}
    ours = HybridLanguageModel(config)
    places = _places(family, config)
    for name, parameter in ours.named_parameters():
        tensor = _read(places[name], theirs, name)
        if parameter.shape != tensor.shape:
            raise ConfigError(f"{name}: shape {tuple(tensor.shape)} does not fit {tuple(parameter.shape)}")
        parameter.data = tensor.clone(memory_format=torch.contiguous_format)  # their dtype and device too
    _take_generation(model, ours)
    return ours.eval()


def to_transformers(model: HybridLanguageModel, name: str) -> PreTrainedModel:
    """Ours as transformers' model type `name`; ConfigError where that form has no place for a setting of ours."""
    family, config = _family(name), model.config
    their_config = family.theirs(config)
    _check_kept(config, family.ours(their_config), name)
    theirs: PreTrainedModel = AutoModelForCausalLM.from_config(their_config)
    places, tensors = _places(family, config), Tensors()
    for own, parameter in model.named_parameters():
        tensors |= places[own].write(parameter.detach())
    wanted = dict(theirs.named_parameters())
    for own, tensor in tensors.items():
        if own in wanted:  # a head that is tied to the embedding stands there once
            wanted[own].data = tensor.clone(memory_format=torch.contiguous_format)
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ConfigError(f"{name}: {missing[0]} has no counterpart in this model")
    _take_generation(model, theirs)
    return theirs.eval()


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"model_type={name!r} cannot be converted; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _places(family: Family, config: HybridConfig) -> dict[str, Place]:
    """Every tensor of ours in terms of theirs."""
    places = {**family.body(config), "lm_head.weight": Same("lm_head.weight")}
    for i in range(config.num_hidden_layers):
        for name, place in family.layer(config).items():
            places[f"model.layers.{i}.{name}"] = _Within(family.prefix.format(i), place)
    return places


class _Within:
    """A place under a layer's prefix."""

    def __init__(self, prefix: str, place: Place) -> None:
        self.prefix, self.place = prefix, place

    def read(self, theirs: Tensors) -> Tensor:
        size = len(self.prefix)
        return self.place.read({name[size:]: t for name, t in theirs.items() if name.startswith(self.prefix)})

    def write(self, ours: Tensor) -> Tensors:
        return {self.prefix + name: t for name, t in self.place.write(ours).items()}


def _read(place: Place, theirs: Tensors, name: str) -> Tensor:
    try:
        return place.read(theirs)
    except KeyError as missing:
        raise ConfigError(f"{name}: the other model has no {missing}") from None


def _check_kept(config: HybridConfig, again: HybridConfig, name: str) -> None:
    """What comes back must be what was sent."""
    ours, theirs = settings_that_matter(config), settings_that_matter(again)
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise ConfigError(f"{name} has no {key}={value!r}; the nearest it has is {theirs.get(key)!r}")


def _take_generation(source: PreTrainedModel, target: PreTrainedModel) -> None:
    if source.generation_config is not None:
        target.generation_config = copy.deepcopy(source.generation_config)
