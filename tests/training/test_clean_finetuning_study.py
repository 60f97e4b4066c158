import json

import pytest
import torch
from safetensors.torch import load_file

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification

DEMO = "hf_smoothing/data/cifar10_demo.parquet"


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    config = MixedNoiseViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, stem="pool", num_labels=7
    )
    MixedNoiseViTForImageClassification(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def study(processes, base):
    def run(folder, *options):
        return processes.run(
            "scripts/studies/clean_finetuning_study.py", "--model_name_or_path", base, "--dataset_name", DEMO,
            "--eval_split", "train", "--num_train_epochs", "2", "--more_epochs", "3", "--batch_size", "32",
            "--train_samples", "40", "--sigmas", "0", "0.5", "--certify_sigmas", "0.5", "--eval_samples", "20",
            "--certify_samples", "3", "--output_dir", folder, *options,
        )  # fmt: skip

    return run


def test_arms_differ_in_what_they_train(study, base, tmp_path):
    done = study(tmp_path / "study", "--base_shares", "0.5")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    rows = {(row["name"], row["base_share"]): row for row in results["arms"]}
    names = {name for name, _ in rows}
    assert len(names) == 8
    # a frozen trunk has no other weights to average
    assert {name for name, share in rows if share == 0.5} == names - {"frozen trunk"}
    row = rows["head first", 0.5]
    assert list(row["accuracy"]) == ["0", "0.5"]
    assert list(row["certified_accuracy"]["0.5"]) == ["0", "0.25", "0.5"]

    def read_encoder(folder):
        weights = load_file(folder / "model.safetensors")
        return {name: value for name, value in weights.items() if name.startswith("mixed_noise_vit")}

    pretrained = read_encoder(base)
    for folder, kept in (("frozen-trunk/head", True), ("head-first/head", True), ("head-first/all", False)):
        tuned = read_encoder(tmp_path / "study" / folder)
        assert all(torch.equal(tuned[name], pretrained[name]) for name in pretrained) == kept, folder
    training = json.loads((tmp_path / "study" / "more-epochs" / "all" / "results" / "training.json").read_text())
    assert training["steps"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--base_shares", "1"), "base_shares=[1.0]"),
        (("--layer_decays", "0.5"), "layer_decays=[0.5]"),
        (("--max_draws", "3"), "max_draws=3"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_training(study, options, message, tmp_path):
    refused = study(tmp_path / "study", *options)
    assert refused.returncode == 1
    assert message in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "study").exists()
