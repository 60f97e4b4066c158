"""The optimizer of the encoder's matrices, and which parameters it gets."""

import pytest
import torch
from torch import nn

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification
from hf_smoothing.training.muon import MuonAdamW
from hf_smoothing.training.parameter_groups import group_parameters


def test_muon_takes_the_matrices_of_the_encoder():
    model = MixedNoiseViTForImageClassification(
        MixedNoiseViTConfig(image_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, stem="pool")
    )
    groups = group_parameters(model, 1.0, 0.1, 0.5, muon_learning_rate=20.0)
    of_muon = {id(parameter): group for group in groups if group["muon"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in of_muon}
    encoder = "mixed_noise_vit.encoder"
    left_out = (f"{encoder}.pos_embed", f"{encoder}.patch_embed.backbone.conv.weight", "classifier.weight")
    assert names == {name for name, parameter in model.named_parameters() if parameter.ndim > 1} - set(left_out)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    blocks = model.mixed_noise_vit.encoder.blocks
    last = of_muon[id(blocks[2].attn.qkv.weight)]["lr"]
    assert of_muon[id(blocks[1].attn.qkv.weight)]["lr"] == last / 2
    norms = next(
        group for group in groups if any(parameter is blocks[2].norm1.weight for parameter in group["params"])
    )
    assert last == 20 * norms["lr"]
    assert not any(group["muon"] for group in group_parameters(model, 1.0, 0.1, 0.5))
    with pytest.raises(ValueError, match=r"muon_learning_rate=0.03 takes a mixed-noise ViT"):
        group_parameters(nn.Linear(2, 2), 1.0, 0.1, 1.0, muon_learning_rate=0.03)


def test_muon_updates_have_singular_values_near_1():
    matrix = nn.Parameter(torch.randn(24, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    bias = nn.Parameter(torch.zeros(3))
    before = matrix.detach().clone()
    options = {"lr": 0.1, "weight_decay": 0.5}
    optimizer = MuonAdamW(
        [{"params": [matrix], "muon": True, **options}, {"params": [bias], "muon": False, **options}]
    )
    matrix.grad, bias.grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1)), torch.ones(3)
    optimizer.step()
    update = (before * (1 - 0.1 * 0.5) - matrix.detach()) / 0.1
    values = torch.linalg.svdvals(update.flatten(1))
    assert values.min() > 0.5
    assert values.max() < 1.3
    torch.testing.assert_close(bias.detach(), torch.full((3,), -0.1), rtol=1e-4, atol=0)  # AdamW's first update
