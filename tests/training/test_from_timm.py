"""Mixed-noise ViTs from timm's: the same features for the same weights, and clear errors."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock

from hf_smoothing import from_timm
from hf_smoothing.training import from_timm as module


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit", "deit_tiny_patch16_224"])
def test_the_architecture_is_that_of_timm(name):
    model = from_timm(name, pretrained=False, num_labels=4)
    config = model.config
    pixel_values = torch.rand(1, 3, config.image_size, config.image_size)
    assert model.eval()(pixel_values).logits.shape == (1, 4)
    assert config.stem == "patch"


@pytest.fixture
def use_small_model(monkeypatch):
    """Let timm build a small ViT with random weights, with some of its options changed."""

    def use(**options):
        torch.manual_seed(1)
        sizes = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes, **options).eval()
        monkeypatch.setattr(module.timm, "create_model", lambda *args, **kwargs: model)
        return model

    return use


def test_features_equal_those_of_timm(use_small_model):
    source = use_small_model()
    model = from_timm("vit_tiny_patch16_224").eval()
    normalized = torch.randn(1, 3, 32, 32)
    pixel_values = normalized * model.mixed_noise_vit.image_std + model.mixed_noise_vit.image_mean
    torch.testing.assert_close(
        model.mixed_noise_vit(pixel_values).pooler_output, source(normalized), rtol=1e-4, atol=1e-4
    )


def test_weights_that_cannot_be_loaded_are_an_error():
    with pytest.raises(ValueError, match="The weights of timm's 'vit_tiny_patch16_224' cannot be loaded"):
        from_timm("vit_tiny_patch16_224", num_labels=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16", r"has no model 'vit_tiny_patch16'\. Close: .*vit_tiny_patch16_224"),
        ("resnet18", "it is a ResNet"),
    ],
)
def test_names_of_other_models(name, message):
    with pytest.raises(ValueError, match=message):
        from_timm(name, pretrained=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "map"}, "it pools with 'map'"),
        ({"fc_norm": True}, "it normalizes after pooling"),
        ({"block_fn": ResPostBlock}, "is not a ViT"),
        ({"act_layer": "quick_gelu"}, "its features differ"),
    ],
)
def test_vits_of_another_architecture(use_small_model, options, message):
    use_small_model(**options)
    with pytest.raises(ValueError, match=message):
        from_timm("vit_tiny_patch16_224")
