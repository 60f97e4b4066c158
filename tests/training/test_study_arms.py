import os
import signal
import sys

import pytest
import torch
from helpers.process_server import ROOT

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification
from hf_smoothing.core.preprocessing import Preprocessing
from hf_smoothing.data.labelled_images import LabelledImages
from hf_smoothing.training.pretrained_classifiers import create_image_processor
from hf_smoothing.training.training_images import ImageSettings, TrainingBatches, find_class_names

DEMO = "hf_smoothing/data/cifar10_demo.parquet"
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "num_labels": 10}


@pytest.fixture
def study_arms(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "studies"))
    import study_arms

    yield study_arms
    del sys.modules["study_arms"]


def test_decoded_images_give_the_batches_of_a_training(study_arms, tmp_path):
    study_arms.decode_images(tmp_path / "images", DEMO, "train", 40, 32, processes=1)
    decoded = study_arms.DecodedImages.load(tmp_path / "images")
    images, settings = LabelledImages(DEMO, split="train", max_samples=40), ImageSettings(DEMO)
    assert decoded.class_names == find_class_names(images)
    inputs = images.bind(find_class_names(images), Preprocessing.from_image_processor(create_image_processor(32)))
    expected = list(TrainingBatches(inputs, settings, 32, 16, seed=5).epoch(1, first=1))
    batches = list(study_arms._DecodedBatches(decoded, settings, 16, seed=5).epoch(1, first=1))
    assert len(batches) == len(expected) == 1
    for tensor, expected_tensor in zip(batches[0], expected[0]):
        assert torch.equal(tensor, expected_tensor)


@pytest.mark.filterwarnings("ignore:norm_layer")
def test_reestimated_statistics_are_those_of_noisy_images(study_arms, tmp_path):
    study_arms.decode_images(tmp_path / "images", DEMO, "train", 40, 32, processes=1)
    decoded = study_arms.DecodedImages.load(tmp_path / "images")
    model = MixedNoiseViTForImageClassification(MixedNoiseViTConfig(norm_layer="batchnorm", **SMALL)).eval()
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    variances = []
    for sigma in (0.0, 1.0):
        study_arms._reestimate_statistics(model, decoded, sigma, seed=0)
        variances.append(norm.running_var.clone())
    assert not model.training
    # the first convolution sees pixels in [-1, 1], so noise of sigma 1 has a variance of 4
    added = 4 * model.mixed_noise_vit.encoder.patch_embed.backbone.conv.weight.detach().square().sum((1, 2, 3))
    inner = variances[1] - variances[0]
    torch.testing.assert_close(inner, added, rtol=0.1, atol=0.1)


def test_intervals_are_over_seeds_or_with_one_seed_over_images(study_arms):
    first, second = [[True, True, False, True]] * 2 + [[True] * 4], [[False, True, False, True]] * 3
    difference = study_arms.compute_difference(first, second)
    assert difference["seeds"] == [0.25, 0.25, 0.5]
    assert difference["difference"] == pytest.approx(1 / 3)
    # Student t with two degrees of freedom: 4.3027 times the standard deviation over the root of three
    assert difference["interval_95"] == pytest.approx([1 / 3 - 0.35855, 1 / 3 + 0.35855], abs=1e-4)
    one = study_arms.compute_difference(first[:1], second[:1])
    assert one["interval_95"] == pytest.approx([0.25 - 0.79561, 0.25 + 0.79561], abs=1e-4)
    share = study_arms.compute_share(first)
    assert share["share"] == pytest.approx(10 / 12)
    assert share["interval_95"][1] == 1.0
    assert "seeds" not in study_arms.compute_share(first[:1])


def test_a_study_certifies_as_many_images_as_it_says(study_arms, tmp_path):
    study_arms.decode_images(tmp_path / "images", DEMO, "train", 6, 32, processes=1)
    decoded = study_arms.DecodedImages.load(tmp_path / "images")
    model = MixedNoiseViTForImageClassification(MixedNoiseViTConfig(**SMALL)).eval()
    settings = study_arms.MeasurementSettings(eval_samples=2, certify_samples=4, eval_draws=1, max_draws=20)
    settings.check_images(tmp_path / "images")
    found = study_arms.evaluate_model(model, decoded, settings, [0.0], {0.5: (0.0,)}, seed=0)
    assert (len(found["right"]["0"]), len(found["certified_radius"]["0.5"])) == (2, 4)
    for name in ("eval_samples", "certify_samples"):
        with pytest.raises(ValueError, match=f"{name}=7: the split 'test' has 6 images"):
            study_arms.MeasurementSettings(**{"eval_samples": 2, "certify_samples": 2, name: 7}).check_images(
                tmp_path / "images"
            )


FAILING_ARM = """
import sys
from pathlib import Path
sys.path.insert(0, "scripts/studies")
from study_arms import run_arms

def run_arm(arm):
    print(f"arm {arm} runs")
    if arm == "b":
        raise OSError("no space")

if __name__ == "__main__":
    run_arms(run_arm, dict(zip("abc", "abc")), Path(__file__).parent, 2, lambda: print("results"))
"""


ORPHANED_ARM = """
import multiprocessing, sys, time
from pathlib import Path
sys.path.insert(0, "scripts/studies")
from study_arms import run_arms

FOLDER = Path(__file__).parent

def run_arm(arm):
    if arm == "a":
        with (FOLDER / "fifo").open("w") as fifo:
            print("runs", file=fifo, flush=True)
            multiprocessing.parent_process().join()
            time.sleep(5)
            print("runs on without the study", file=fifo)

if __name__ == "__main__":
    run_arms(run_arm, {"a": "a", "b": "b"}, FOLDER, 2, print)
"""


def test_arms_end_with_a_study_that_is_killed(processes, tmp_path):
    (tmp_path / "script.py").write_text(ORPHANED_ARM)
    os.mkfifo(tmp_path / "fifo")
    study = processes.start(tmp_path / "script.py")
    with (tmp_path / "fifo").open() as fifo:
        assert fifo.readline() == "runs\n"
        os.kill(study.pid, signal.SIGKILL)
        assert fifo.read() == ""  # until the arm has ended
    study.finish()


def test_an_arm_that_fails_loses_only_itself(processes, tmp_path):
    (tmp_path / "script.py").write_text(FAILING_ARM)
    done = processes.run(tmp_path / "script.py")
    assert done.returncode == 1
    assert "These arms failed: b." in done.stderr
    assert done.stdout.count("results") == 3
    assert "c: finished" in done.stdout
    assert (tmp_path / "a.log").read_text() == "arm a runs\n"
    assert "no space" in (tmp_path / "b.log").read_text()
