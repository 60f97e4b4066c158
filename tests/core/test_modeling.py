import json
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification, MixedNoiseViTModel
from hf_smoothing.core.modeling_mixed_noise_vit import TokenGroupNorm

SMALL = {"image_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 5}


def build(**kwargs) -> MixedNoiseViTForImageClassification:
    torch.manual_seed(0)
    return MixedNoiseViTForImageClassification(MixedNoiseViTConfig(**{**SMALL, **kwargs})).eval()


VARIANTS = [
    {"stem": "conv"},
    {"stem": "pool", "pooling": "max", "layer_scale_init": 0.001},
    {"stem": "pool", "stem_widths": [8, 24, 40], "norm_layer": "groupnorm"},
    {"norm_layer": "rmsnorm"},
    {"stem": "pool", "norm_layer": "rmsnorm", "qk_norm": True},
    {"stem": "patch", "pooling": "token", "num_register_tokens": 2},
    {
        "stem": "patch",
        "pre_norm": True,
        "qk_norm": True,
        "layer_scale_init": 0.1,
        "position_embed_prefix_tokens": False,
    },
    {"num_channels": 1, "image_mean": [0.3], "image_std": [0.1], "patch_size": 8},
]


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_save_and_load_give_the_same_logits(kwargs, tmp_path):
    model = build(**kwargs)
    pixel_values = torch.rand(3, model.config.num_channels, 16, 16)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MixedNoiseViTForImageClassification
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_process_loads_the_same_logits(processes, dtype, tmp_path):
    model = build(drop_path_rate=0.1).to(getattr(torch, dtype))
    pixel_values = torch.linspace(0, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    code = f"""
import json, torch, hf_smoothing
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({str(tmp_path)!r})
assert model.dtype == torch.{dtype}, model.dtype
pixel_values = torch.linspace(0, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
print(json.dumps(model(pixel_values).logits.float().tolist()))
"""
    done = processes.run("-c", code)
    assert done.returncode == 0, done.stderr
    logits = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(logits, model(pixel_values).logits.float(), rtol=0, atol=0)


def test_outputs():
    model = build()
    pixel_values = torch.rand(4, 3, 16, 16)
    output = model(pixel_values, labels=torch.tensor([0, 1, 2, 3]))
    assert output.logits.shape == (4, 5)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2, 3])))
    assert len(model(pixel_values, return_dict=False)) == 1
    encoded = AutoModel.from_config(model.config)(pixel_values)
    assert encoded.last_hidden_state.shape == (4, 16, 32)
    assert encoded.pooler_output.shape == (4, 32)


def test_normalisation_is_inside_and_from_the_config():
    plain = build(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    inside = build(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    inside.load_state_dict(plain.state_dict())
    pixel_values = torch.rand(2, 3, 16, 16)
    by_hand = (pixel_values - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
        3, 1, 1
    )
    torch.testing.assert_close(inside(pixel_values).logits, plain(by_hand).logits)


def test_the_pooling_trunk_starts_by_passing_its_input_on():
    model = build(stem="pool", pooling="max", stem_widths=[8, 16, 32], layer_scale_init=1e-6)
    encoder = model.mixed_noise_vit.encoder
    first = encoder.patch_embed.backbone.groups[0][0]
    features = torch.rand(2, 8, 6, 6)
    torch.testing.assert_close(first(features)[:, :8], features)
    assert first(features)[:, 8:].abs().amin((0, 2, 3)).min() > 0
    assert isinstance(encoder.patch_embed.proj, nn.Identity)  # as wide as the transformer
    output = model.mixed_noise_vit(torch.rand(2, 3, 16, 16), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 9, 32)
    # the blocks start near the identity too
    torch.testing.assert_close(output.hidden_states[0], output.hidden_states[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.amax(1))


def test_a_new_head_keeps_the_pooling_trunk(tmp_path):
    model = build(stem="pool", pooling="max")
    model.save_pretrained(tmp_path)
    loaded = MixedNoiseViTForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    for name, value in model.mixed_noise_vit.state_dict().items():
        torch.testing.assert_close(loaded.mixed_noise_vit.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("norm_layer", ["layernorm", "groupnorm", "rmsnorm"])
@pytest.mark.parametrize("stem", ["patch", "conv", "pool"])
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(stem, norm_layer):
    model = build(stem=stem, norm_layer=norm_layer).train()  # not even in training mode: no batch statistics
    pixel_values = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(model(pixel_values).logits[:1], model(pixel_values[:1]).logits, rtol=1e-4, atol=1e-5)


def test_group_norm_normalizes_groups_of_channels_over_all_tokens_of_an_image():
    norm = TokenGroupNorm(48)
    assert norm.num_groups == 3
    tokens = torch.randn(2, 9, 48) * torch.arange(1, 49) + 5
    groups = norm(tokens).unflatten(2, (3, 16))
    torch.testing.assert_close(groups.mean((1, 3)), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(groups.var((1, 3), correction=0), torch.ones(2, 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("norm_layer", "centers_tokens"), [("layernorm", True), ("groupnorm", False), ("rmsnorm", False)]
)
def test_the_last_hidden_state_is_normalized(norm_layer, centers_tokens):
    last = build(norm_layer=norm_layer).mixed_noise_vit(torch.rand(2, 3, 16, 16)).last_hidden_state
    assert bool(last.mean(2).abs().max() < 1e-3) == centers_tokens
    torch.testing.assert_close(last.square().mean((1, 2)), torch.ones(2), atol=1e-3, rtol=0)


def test_batchnorm_warns_and_is_batchnorm():
    with pytest.warns(UserWarning, match="does not transfer"):
        model = build(norm_layer="batchnorm")
    assert not any(isinstance(module, (nn.LayerNorm, nn.GroupNorm)) for module in model.modules())
    assert model(torch.rand(2, 3, 16, 16)).logits.shape == (2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()


def test_missing_weights_are_initialised_and_loaded_ones_kept(tmp_path):
    """A new head for a new task: the encoder stays as it was loaded."""
    model = build()
    model.save_pretrained(tmp_path)
    other = MixedNoiseViTForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert other.classifier.weight.shape == (7, 32)
    assert 0.01 < other.classifier.weight.std().item() < 0.03
    for name, tensor in model.mixed_noise_vit.state_dict().items():
        torch.testing.assert_close(other.mixed_noise_vit.state_dict()[name], tensor, rtol=0, atol=0)
    MixedNoiseViTModel.from_pretrained(tmp_path)


def test_activation_checkpointing_gives_the_same_gradients():
    model = build().train()
    pixel_values, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    model(pixel_values, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    # an older transformers knows only the second name
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert model.mixed_noise_vit.encoder.grad_checkpointing
    model(pixel_values, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stem": "fourier"}, "stem='fourier'"),
        ({"norm_layer": "instancenorm"}, "norm_layer='instancenorm'"),
        ({"pooling": "map"}, "pooling='map'"),
        ({"stem": "pool", "image_size": 36, "patch_size": 6}, "patch_size=6"),
        ({"stem": "pool", "image_size": 16, "patch_size": 16}, "leaves the pooling trunk no token"),
        ({"stem": "pool", "patch_size": 8, "stem_widths": [32, 64]}, "must be 4 numbers"),
        ({"stem_widths": [32, 64, 128]}, 'for stem="pool"'),
        ({"hidden_size": 32, "num_attention_heads": 3}, "hidden_size=32"),
        ({"image_size": 30}, "image_size=30"),
        ({"stem": "conv", "image_size": 36, "patch_size": 6}, "patch_size=6"),
        ({"pooling": "token", "class_token": False}, "class_token=True"),
        ({"image_mean": [0.5]}, "image_mean has 1 values"),
        ({"image_std": [0.5, 0.5, 0.0]}, "must be positive"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_configurations_that_do_not_fit(kwargs, message):
    with pytest.raises(Exception, match=message):
        MixedNoiseViTConfig(**kwargs)


def test_pixels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\)"):
        build()(torch.rand(2, 3, 8, 8))


def test_the_config_survives_a_round_trip(tmp_path):
    config = MixedNoiseViTConfig(**SMALL, stem="patch", image_mean=[0.1, 0.2, 0.3])
    config.save_pretrained(tmp_path)
    assert {**AutoConfig.from_pretrained(tmp_path).to_dict(), "_name_or_path": ""} == config.to_dict()
