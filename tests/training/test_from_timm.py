"""Mixed-noise ViTs from timm's: the same features for the same weights, and clear errors."""

import pytest
import timm
import torch

from hf_smoothing import from_timm
from hf_smoothing.training import from_timm as module


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit", "deit_tiny_patch16_224"])
def test_the_architecture_of_a_timm_vit(name):
    model = from_timm(name, pretrained=False, num_labels=4)
    config = model.config
    pixel_values = torch.rand(1, 3, config.image_size, config.image_size)
    assert model.eval()(pixel_values).logits.shape == (1, 4)
    assert config.stem == "patch"


def test_the_weights_of_a_timm_vit_where_they_can_be_had(monkeypatch):
    """No network here, so timm is handed weights of our making, as its cache would."""
    torch.manual_seed(1)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    monkeypatch.setattr(module.timm, "create_model", lambda *args, **kwargs: source)
    model = from_timm("vit_tiny_patch16_224").eval()
    normalised = torch.randn(1, 3, 224, 224)
    pixel_values = normalised * model.mixed_noise_vit.image_std + model.mixed_noise_vit.image_mean
    torch.testing.assert_close(
        model.mixed_noise_vit(pixel_values).pooler_output, source(normalised), rtol=1e-4, atol=1e-4
    )


def test_no_weights_to_be_had_is_said():
    with pytest.raises(ValueError, match="The weights of timm's 'vit_tiny_patch16_224' cannot be loaded"):
        from_timm("vit_tiny_patch16_224", num_labels=2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_tiny_patch16", r"has no model 'vit_tiny_patch16'\. Close: .*vit_tiny_patch16_224"),
        ("resnet18", "it is a ResNet"),
        ("vit_base_patch16_siglip_224", "it pools with 'map'"),
        ("vit_base_patch16_rpn_224", "is not a ViT"),
        ("vit_base_patch32_clip_quickgelu_224", "its features differ"),
    ],
)
def test_timm_models_that_do_not_fit(name, said):
    with pytest.raises(ValueError, match=said):
        from_timm(name, pretrained=False)
