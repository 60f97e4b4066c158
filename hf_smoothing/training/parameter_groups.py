"""The parameter groups of the optimizer: weight decay, and layer-wise decay of the learning rate."""

from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import nn


def group_parameters(
    model: Any, learning_rate: float, weight_decay: float, layer_decay: float, muon_learning_rate: float = 0.0
) -> list[dict[str, Any]]:
    """
    Group the trainable parameters of a model for [`MuonAdamW`] (or AdamW, without `muon_learning_rate`).

    One-dimensional parameters and position embeddings get no weight decay. The learning rate of each layer of the encoder is
    `layer_decay` times that of the next layer (timm's grouping; Bao et al. 2021, BEiT).

    Args:
        model: a mixed-noise ViT; any other model only with a `layer_decay` of 1, since its layers are unknown.
        learning_rate: of the last layer and of the head.
        weight_decay: of the parameters that decay.
        layer_decay: above 0, at most 1.
        muon_learning_rate: of the last layer's matrices. Muon takes the encoder's matrices except that of its first
            layer; 0 leaves them to AdamW.

    Raises:
        ValueError: for a `layer_decay` below 1, or Muon, with another model.
    """
    groups, encoder_parameters = [], set()
    if hasattr(model, "mixed_noise_vit"):
        encoder = model.mixed_noise_vit.encoder
        groups = param_groups_layer_decay(
            encoder, weight_decay, no_weight_decay_list=encoder.no_weight_decay(), layer_decay=layer_decay
        )
        encoder_parameters = {id(parameter) for parameter in encoder.parameters()}
        if muon_learning_rate:
            first_layer = next(module for module in encoder.patch_embed.modules() if isinstance(module, nn.Conv2d))
            groups = _part_matrices(groups, first_layer.weight, muon_learning_rate / learning_rate)
    else:
        for name, value, given in (
            ("layer_decay", layer_decay, layer_decay < 1),
            ("muon_learning_rate", muon_learning_rate, muon_learning_rate),
        ):
            if given:
                raise ValueError(f"{name}={value:g} takes a mixed-noise ViT: for other models leave it out.")
    others = [
        parameter
        for parameter in model.parameters()
        if id(parameter) not in encoder_parameters and parameter.requires_grad
    ]
    for decay, parameters in (
        (weight_decay, [parameter for parameter in others if parameter.ndim > 1]),
        (0.0, [parameter for parameter in others if parameter.ndim <= 1]),
    ):
        if parameters:
            groups.append({"params": parameters, "weight_decay": decay, "lr_scale": 1.0})
    return [{"muon": False, **group, "lr": learning_rate * group.pop("lr_scale")} for group in groups]


def _part_matrices(groups: list[dict[str, Any]], first: torch.Tensor, lr_scale: float) -> list[dict[str, Any]]:
    """Part the matrices of each group from its other parameters, for Muon."""
    parted = []
    for group in groups:
        for muon in (True, False):
            parameters = [
                parameter
                for parameter in group["params"]
                if muon == (parameter.ndim > 1 and group["weight_decay"] > 0 and parameter is not first)
            ]
            if parameters:
                scale = group["lr_scale"] * (lr_scale if muon else 1.0)
                parted.append({**group, "params": parameters, "muon": muon, "lr_scale": scale})
    return parted
