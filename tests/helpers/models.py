"""Small classifiers and model folders, made on the spot."""

from pathlib import Path

import torch
from transformers import ViTImageProcessor

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification

NAMES = ["truck", "Ship", "horse", "frog", "dog", "deer", "cat", "bird", "automobile", "airplane"]
"""The classes of the demo images, in another order than the dataset's."""


class LinearClassifier:
    """Two classes, separated by a hyperplane: its smoothed prediction and certified radius are known in closed form."""

    def __init__(self, direction: torch.Tensor, offset: float = 0.0):
        self.direction = direction
        self.offset = offset

    def margin(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.direction + self.offset

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        margin = self.margin(images)
        return torch.stack([-margin, margin], 1)

    def exact_radius(self, images: torch.Tensor) -> torch.Tensor:
        """Distance to the hyperplane, whatever sigma: Cohen et al. 2019, proposition 4."""
        return self.margin(images).abs() / self.direction.norm()


def tiny_model(names: list[str]) -> MixedNoiseViTForImageClassification:
    """A classifier of 8x8 pixels with random weights, the same ones each time; seeds torch."""
    config = MixedNoiseViTConfig(
        image_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    torch.manual_seed(0)
    return MixedNoiseViTForImageClassification(config)


def save_with_processor(model: MixedNoiseViTForImageClassification, folder: str | Path) -> str:
    """Save a model and its image processor as a folder like those on the Hub."""
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False).save_pretrained(folder)
    return str(folder)


def save_model(folder: str | Path, names: list[str]) -> str:
    """Save a model folder whose classifier tells dark from bright pictures: some are certified and others not."""
    model = tiny_model(names)
    light = torch.rand(512, 1, 1, 1)
    features = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        model.eval()(light + 0.25 * torch.randn(512, 3, 8, 8))
        targets = torch.nn.functional.one_hot((light.flatten() * 3).long().clamp(max=len(names) - 1), len(names))
        inputs = torch.cat([features[0], torch.ones(512, 1)], 1)
        solution = torch.linalg.lstsq(inputs, targets.float(), driver="gelsd").solution
        model.classifier.weight.copy_(solution[:-1].T)
        model.classifier.bias.copy_(solution[-1])
    hook.remove()
    return save_with_processor(model, folder)
