"""The parameter groups of the optimizer: weight decay, and layer-wise decay of the learning rate."""

from typing import Any

from timm.optim import param_groups_layer_decay


def group_parameters(
    model: Any, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """
    Group the trainable parameters of a model for AdamW.

    One-dimensional parameters and position embeddings get no weight decay. The learning rate of each layer of the encoder is
    `layer_decay` times that of the next layer (timm's grouping; Bao et al. 2021, BEiT).

    Args:
        model: a mixed-noise ViT; any other model only with a `layer_decay` of 1, since its layers are unknown.
        learning_rate: of the last layer and of the head.
        weight_decay: of the parameters that decay.
        layer_decay: above 0, at most 1.

    Raises:
        ValueError: for a `layer_decay` below 1 with another model.
    """
    groups, encoder_parameters = [], set()
    if hasattr(model, "mixed_noise_vit"):
        encoder = model.mixed_noise_vit.encoder
        groups = param_groups_layer_decay(
            encoder, weight_decay, no_weight_decay_list=encoder.no_weight_decay(), layer_decay=layer_decay
        )
        encoder_parameters = {id(parameter) for parameter in encoder.parameters()}
    elif layer_decay < 1:
        raise ValueError(f"layer_decay={layer_decay:g} takes a mixed-noise ViT: for other models leave it out.")
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
    return [{**group, "lr": learning_rate * group.pop("lr_scale")} for group in groups]
