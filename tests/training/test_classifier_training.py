import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import save_model
from transformers import BertConfig, pipeline

from hf_smoothing import MixedNoiseViTForImageClassification
from hf_smoothing.hub.results_pages import render_results
from hf_smoothing.training.classifier_training import train_classifier
from hf_smoothing.training.evaluation import EvaluationSettings, predict_majority
from hf_smoothing.training.losses import consistency_loss
from hf_smoothing.training.pretrained_classifiers import load_for_finetuning
from hf_smoothing.training.training_images import ImageSettings, find_class_names
from hf_smoothing.training.training_loop import TrainingSettings


def by_brightness(pixels):
    """Class 1 where a picture is brighter than .5 on average."""
    bright = (pixels.mean((1, 2, 3)) - 0.5) * 100
    return SimpleNamespace(logits=torch.stack([-bright, bright], 1))


def test_the_majority_of_noisy_copies():
    levels = torch.tensor([0.1, 0.45, 0.55, 0.9])
    pixels = levels.view(4, 1, 1, 1).expand(4, 3, 2, 2).contiguous()
    truth = [0, 0, 1, 1]
    assert predict_majority(by_brightness, pixels, 0.0, draws=5).tolist() == truth
    # .05 is .35 standard deviations of the mean at sigma .5: single draws err, the majority of many does not
    assert predict_majority(by_brightness, pixels, 0.5, draws=400, batch_size=3).tolist() == truth
    single = torch.stack([predict_majority(by_brightness, pixels, 0.5, draws=1, seed=seed) for seed in range(50)])
    assert 0.5 < (single[:, 1] == 0).float().mean() < 0.8


def test_consistency_loss_by_hand():
    # probabilities .9/.1 and .5/.5, mean .7/.3
    logits = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log() + 3
    divergence = sum(m * math.log(m / p) for copy in ((0.9, 0.1), (0.5, 0.5)) for m, p in zip((0.7, 0.3), copy)) / 2
    entropy = -sum(m * math.log(m) for m in (0.7, 0.3))
    assert float(consistency_loss(logits, 10.0)) == pytest.approx(10 * divergence + 0.5 * entropy, rel=1e-5)
    alike = logits[:1].expand(3, 1, 2)
    assert float(consistency_loss(alike, 10.0, entropy_weight=0.0)) == pytest.approx(0.0, abs=1e-6)


def test_the_loss_grows_with_the_consistency_weight(demo_images, tmp_path):
    path = tmp_path / "images.parquet"
    demo_images.select(range(0, 200, 10)).to_parquet(path)
    losses = []
    base = save_model(tmp_path / "base", demo_images.features["label"].names)
    for weight in (10.0, 20.0, 40.0):  # one step each, from the same weights, with the same images and noise
        images = ImageSettings(str(path), sigmas=[0.5], consistency_weight=weight)
        opened = images.open()
        settings = TrainingSettings(
            str(tmp_path / f"weight-{weight:g}"), max_train_steps=1, per_device_train_batch_size=20
        )
        model, _ = load_for_finetuning(base, find_class_names(opened))
        results = train_classifier(
            model, opened, images, settings, EvaluationSettings(), settings.create_accelerator()
        )
        losses.append(results["final_loss"])
    divergence = (losses[1] - losses[0]) / 10
    assert divergence > 0.003  # the predictions for two noisy copies differ
    assert (losses[2] - losses[1]) / 20 == pytest.approx(divergence, rel=1e-4)


def test_a_share_of_the_base_is_saved_and_evaluated(demo_images, tmp_path):
    """The saved weights lie between those of the base and of a training without the share, but the head is trained."""
    path = tmp_path / "images.parquet"
    demo_images.select(range(0, 200, 10)).to_parquet(path)
    base = save_model(tmp_path / "base", ["a", "b", "c"])
    images, models, results = ImageSettings(str(path)), {}, {}
    evaluation = EvaluationSettings("train", eval_samples=20, eval_sigmas=[0.0])
    for share in (0.0, 0.25):
        opened, folder = images.open(), str(tmp_path / f"share-{share}")
        settings = TrainingSettings(
            folder, num_train_epochs=2, per_device_train_batch_size=10, learning_rate=0.05, ema_decay=0.5
        )
        torch.manual_seed(0)  # for the head
        model, _ = load_for_finetuning(base, find_class_names(opened))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        results[share] = train_classifier(
            model, opened, images, settings, evaluation, settings.create_accelerator(), base, base_share=share
        )
        models[share] = MixedNoiseViTForImageClassification.from_pretrained(folder)
    trained = models[0.0].state_dict()
    for name, weights in models[0.25].state_dict().items():
        head = name.startswith("classifier")
        expected = trained[name] if head else 0.75 * trained[name] + 0.25 * before[name]
        torch.testing.assert_close(weights, expected)
    assert not torch.allclose(trained["classifier.weight"], before["classifier.weight"], atol=0.01)
    assert results[0.25]["settings"]["base_share"] == 0.25
    chosen = demo_images.select(range(0, 200, 10))
    names = chosen.features["label"].names
    for share, result in results.items():
        classify = pipeline("image-classification", model=str(tmp_path / f"share-{share}"), top_k=1)
        right = [classify(row["image"])[0]["label"] == names[row["label"]] for row in chosen]
        assert result["evaluation"]["majority_accuracy_sigma_0"] == pytest.approx(np.mean(right))


def test_the_head_is_kept_only_for_the_same_classes(tiny_model_dir):
    source = MixedNoiseViTForImageClassification.from_pretrained(tiny_model_dir)
    same, _ = load_for_finetuning(str(tiny_model_dir), ["cat", "dog", "frog"])
    assert torch.equal(same.classifier.weight, source.classifier.weight)
    for names in (["dog", "cat", "frog"], ["a", "b", "c"], ["a", "b"], [str(i) for i in range(7)]):
        model, _ = load_for_finetuning(str(tiny_model_dir), names, drop_path_rate=0.1)
        assert [model.config.id2label[index] for index in range(len(names))] == names
        assert model.config.label2id[names[1]] == 1
        assert model.config.num_labels == model.classifier.out_features == len(names)
        assert not torch.equal(model.classifier.weight[:2], source.classifier.weight[:2])
        assert 0 < model.classifier.weight.std() < 0.1
        assert model.config.drop_path_rate == 0.1
        assert torch.equal(
            model.mixed_noise_vit.encoder.blocks[1].attn.qkv.weight,
            source.mixed_noise_vit.encoder.blocks[1].attn.qkv.weight,
        )


def test_timm_and_other_models(tmp_path):
    with pytest.raises(ValueError, match="The weights of timm's"):  # offline: never silently with random weights
        load_for_finetuning("timm/vit_tiny_patch16_224", ["a", "b"])
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertConfig"):
        load_for_finetuning(str(tmp_path), ["a", "b"])
    with pytest.raises(ValueError, match="nowhere"):
        load_for_finetuning("nobody/nowhere", ["a", "b"])


def test_weights_that_are_not_those_of_the_config_are_refused(tiny_model_dir, tmp_path):
    for field, value in (("num_hidden_layers", 1), ("hidden_size", 64), ("image_size", 64)):
        folder = tmp_path / field
        shutil.copytree(tiny_model_dir, folder)
        config = json.loads((folder / "config.json").read_text())
        assert config[field] != value
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ValueError, match=r"are not those of its config\.json"):
            load_for_finetuning(str(folder), ["a", "b"])
    weights = tiny_model_dir / "model.safetensors"
    (tmp_path / "cut").mkdir()
    shutil.copy(tiny_model_dir / "config.json", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match="its weights are damaged"):
        load_for_finetuning(str(tmp_path / "cut"), ["a", "b"])


def test_a_single_file_has_no_other_split(parquet, tiny_model_dir, tmp_path):
    images = ImageSettings(str(parquet), max_train_samples=40)
    opened = images.open()
    model, _ = load_for_finetuning(str(tiny_model_dir), find_class_names(opened))
    settings = TrainingSettings(str(tmp_path), max_train_steps=1, per_device_train_batch_size=20)
    with pytest.raises(ValueError, match="is one file, which has no split 'test'"):
        train_classifier(model, opened, images, settings, EvaluationSettings("test"), settings.create_accelerator())


def test_training_saves_the_model_and_its_results(tiny_model_dir, demo_images, tmp_path):
    path = tmp_path / "demo.parquet"
    demo_images.to_parquet(path)
    image_settings = ImageSettings(
        str(path), max_train_samples=40, sigmas=[0.0, 0.5], mixup_alpha=0.2, label_smoothing=0.1
    )
    settings = TrainingSettings(str(tmp_path / "out"), num_train_epochs=2, per_device_train_batch_size=20)
    images = image_settings.open()
    model, _ = load_for_finetuning(str(tiny_model_dir), find_class_names(images))
    evaluation = EvaluationSettings("train", eval_samples=5000, eval_draws=1, eval_sigmas=[0.0, 0.5])
    results = train_classifier(
        model, images, image_settings, settings, evaluation, settings.create_accelerator(), str(tiny_model_dir)
    )
    assert results == json.loads((tmp_path / "out" / "results" / "training.json").read_text())
    assert results["steps"] == 4
    assert results["images_seen"] == 80
    assert results["evaluation"].keys() == {"majority_accuracy_sigma_0", "majority_accuracy_sigma_0.5"}
    assert results["num_eval_images"] == 200  # not the 5,000 that were asked for
    for template in ("training", "training_summary"):
        assert "on 200 images of the split `train`" in render_results(template, results)
    reloaded = MixedNoiseViTForImageClassification.from_pretrained(tmp_path / "out")
    assert reloaded.config.id2label[6] == "frog"


@pytest.mark.parametrize(
    "wrong", [{"eval_samples": 0}, {"eval_draws": 0}, {"eval_sigmas": [-1.0]}, {"eval_sigmas": []}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvaluationSettings("test", **wrong)
