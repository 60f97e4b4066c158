import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import multivariate_hypergeom
from transformers import AutoImageProcessor

from hf_smoothing import GaussianNoise, SmoothedClassifier
from hf_smoothing.core.preprocessing import Preprocessing
from hf_smoothing.core.rules import make_rule
from hf_smoothing.count_head.count_batches import CountBatches, group_counts_by_image, subsample_counts
from hf_smoothing.count_head.measured_counts import read_counts
from hf_smoothing.count_head.training import (
    CountHeadSettings,
    build_count_model,
    compute_prediction_errors,
    train_count_head,
)
from hf_smoothing.hub.results_pages import render_results
from hf_smoothing.runs.dataset_run import RunSettings, certify_dataset
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.processes import start_processes


@pytest.fixture(scope="module")
def counts_dir(model, parquet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("counts")
    settings = RunSettings(model, parquet, (0.25, 1.0), split="train", every=2, method="counts", n=40, seed=0)
    certify_dataset(settings, folder, accelerator=start_processes())
    return folder


def test_counting_takes_n_draws_and_claims_nothing(linear, small_images):
    smoothed = SmoothedClassifier(linear, GaussianNoise(0.5), batch_size=7)
    found = smoothed.certify(small_images, method="counts", n=2000, seed=0)
    for certificate, probability in zip(found, torch.special.ndtr(linear.margin(small_images) / 0.5).tolist()):
        assert certificate.guarantee == "none"
        assert certificate.radius == 0
        assert certificate.num_samples == sum(certificate.counts) == 2000
        # six standard deviations of the share
        assert certificate.counts[1] / 2000 == pytest.approx(probability, abs=6 * (0.25 / 2000) ** 0.5)
    with pytest.raises(ValueError, match="radius"):
        make_rule("counts", radius=0.5)
    with pytest.raises(ValueError, match="n=0"):
        make_rule("counts", n=0)


def test_a_run_of_counts_is_read(counts_dir):
    counts = read_counts(counts_dir)
    assert sorted(set(counts.sigmas)) == [0.25, 1.0]
    assert len(counts.indices) == 200
    assert (counts.counts.sum(1) == 40).all()
    assert len(counts.open_images().source) == 200


def test_counts_that_would_mislead_are_refused(counts_dir, tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        read_counts(tmp_path)
    run = json.loads((counts_dir / "run.json").read_text())
    pq.write_table(pq.read_table(counts_dir / "certificates.parquet"), tmp_path / "certificates.parquet")
    run["settings"]["method"] = "sequential"
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="stops when it has seen enough"):
        read_counts(tmp_path)
    counts = read_counts(counts_dir)
    with pytest.raises(ValueError, match="changed, copied or touched"):
        replace(counts, settings={**counts.settings, "dataset_fingerprint": "another"}).open_images()
    with pytest.raises(ValueError, match="has the classes"):
        build_count_model(
            CountHeadSettings(run["settings"]["model_name_or_path"]),
            replace(counts, settings={"label_names": ["a", "b"]}),
        )


@pytest.mark.parametrize(("loss", "own_backbone"), [("jensen_shannon", False), ("logistic_normal", True)])
def test_a_head_learns_the_counts(counts_dir, tmp_path, own_backbone, loss):
    counts = read_counts(counts_dir)
    base = counts.settings["model_name_or_path"]
    torch.manual_seed(0)
    head = CountHeadSettings(base, loss=loss, own_backbone=own_backbone)
    model = build_count_model(head, counts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = TrainingSettings(
        str(tmp_path / "out"), num_train_epochs=40, per_device_train_batch_size=19, learning_rate=3e-3
    )
    found = train_count_head(model, counts, head, settings, settings.create_accelerator())
    rows = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    evaluations = [row["evaluation"]["jensen_shannon"] for row in rows if "evaluation" in row]
    assert evaluations[-1] < 0.8 * evaluations[0]
    assert found["evaluation"]["top1_disagreement"] < 0.5
    assert f"{found['evaluation']['jensen_shannon']:.4f}" in render_results("training", found)  # the page of its card
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("count_head") for name in changed)
    assert own_backbone == any(not name.startswith("count_head") for name in changed)


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_an_own_backbone_may_see_images_mirrored(counts_dir, tmp_path, hflip):
    counts = read_counts(counts_dir)
    base = counts.settings["model_name_or_path"]
    head = CountHeadSettings(base, own_backbone=True, hflip=hflip, eval_share=0.0)
    model, seen = build_count_model(head, counts), []
    model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["pixel_values"]) if model.training else None, with_kwargs=True
    )
    settings = TrainingSettings(str(tmp_path / "out"), max_train_steps=1, per_device_train_batch_size=4)
    found = train_count_head(model, counts, head, settings, settings.create_accelerator())
    assert found["settings"]["hflip"] == hflip
    preprocessing = Preprocessing.from_image_processor(AutoImageProcessor.from_pretrained(base))
    inputs = counts.open_images().bind(counts.settings["label_names"], preprocessing)
    pixels = torch.stack([inputs[index][0] for index in group_counts_by_image(counts)[0]])
    shown = pixels.flip(-1) if hflip else pixels
    assert len(seen) == 1
    assert all((shown - one).abs().amax((1, 2, 3)).min() < 0.003 for one in seen[0])


def test_an_own_backbone_may_see_images_shifted(counts_dir, tmp_path):
    counts = read_counts(counts_dir)
    base = counts.settings["model_name_or_path"]
    head = CountHeadSettings(base, own_backbone=True, hflip=0.0, max_shift=2, eval_share=0.0)
    model, seen = build_count_model(head, counts), []
    model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["pixel_values"]) if model.training else None, with_kwargs=True
    )
    settings = TrainingSettings(str(tmp_path / "out"), max_train_steps=2, per_device_train_batch_size=25)
    assert train_count_head(model, counts, head, settings, settings.create_accelerator())["settings"]["max_shift"] == 2
    preprocessing = Preprocessing.from_image_processor(AutoImageProcessor.from_pretrained(base))
    inputs = counts.open_images().bind(counts.settings["label_names"], preprocessing)
    pixels = torch.stack([inputs[index][0] for index in group_counts_by_image(counts)[0]])
    padded = torch.nn.functional.pad(pixels, [2] * 4)
    crops = padded.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).reshape(len(pixels), 25, 3, 8, 8)
    # which of the 25 crops of which image each one is
    found = [int((crops - one).abs().amax((2, 3, 4)).min(0).values.argmin()) for one in torch.cat(seen)]
    assert all((crops - one).abs().amax((2, 3, 4)).min() < 0.003 for one in torch.cat(seen))
    assert len(set(found)) > 15
    with pytest.raises(ValueError, match="max_shift=-1"):
        CountHeadSettings(base, max_shift=-1)


def test_many_draws_are_thinned_to_what_the_loss_is_for(counts_dir, tmp_path):
    generator = np.random.default_rng(0)
    counts = torch.tensor([[900.0, 80.0, 20.0], [3.0, 1.0, 0.0]]).repeat(3000, 1)
    fewer = subsample_counts(counts, 16, generator)
    assert fewer.dtype == counts.dtype
    assert (fewer >= 0).all()
    assert (fewer <= counts).all()
    assert torch.equal(fewer[1::2], counts[1::2])  # few stay as they are
    many = fewer[::2].numpy()
    assert (many.sum(1) == 16).all()
    exact = multivariate_hypergeom([900, 80, 20], 16)
    assert many.mean(0) == pytest.approx(exact.mean(), abs=4 * np.sqrt(exact.var().max() / 3000))
    assert many.var(0) == pytest.approx(exact.var(), rel=0.15)
    batches = CountBatches(
        torch.arange(6000), torch.cat([torch.ones(6000, 1), counts], 1)[:, None], 50, 0, max_draws=16
    )
    (_, first), (_, again), (_, later) = (next(batches.epoch(epoch)) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert (first[..., 0] == 1).all()
    assert (first[..., 1:].sum(-1) <= 16).all()
    one = read_counts(counts_dir)
    one = replace(one, counts=np.eye(one.counts.shape[1], dtype=int)[one.counts.argmax(1)])
    settings = TrainingSettings(str(tmp_path / "out"))
    for loss, draws in (("logistic_normal", 2), ("probit", 100)):
        head = CountHeadSettings(one.settings["model_name_or_path"], loss=loss)
        with pytest.raises(ValueError, match=f"takes {draws} draws per image or more; the counts have 1"):
            train_count_head(build_count_model(head, one), one, head, settings, settings.create_accelerator())


def test_prediction_errors_by_hand():
    class Says:
        def __call__(self, features, sigma):
            return type("Output", (), {"logits": features.log()[:, None]})

    predicted = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    targets = torch.tensor([[[0.5, 6, 4]], [[0.5, 8, 2]]])
    errors = compute_prediction_errors(Says(), predicted, targets)
    assert errors["top1_disagreement"] == 0.5
    assert errors["top_frequency_error"] == pytest.approx(((0.7 - 0.6) + (0.4 - 0.8)) / 2)


def test_batches_cover_all_images_once_and_processes_share_them():
    inputs = torch.arange(20)[:, None]
    targets = torch.arange(20)[:, None, None] * 10
    seen = []
    for process in range(2):
        batches = CountBatches(inputs, targets, 5, 0, process, 2)
        assert len(batches) == 2
        for batch, target in batches.epoch(3):
            assert (batch.flatten() * 10 == target.flatten()).all()
            seen += batch.flatten().tolist()
        late = list(batches.epoch(3, 1))
        assert len(late) == 1
        assert torch.equal(late[0][0].flatten(), torch.tensor(seen[-5:]))
    assert sorted(seen) == list(range(20))
    (batch,) = CountBatches(inputs, targets, 21, 0).epoch(1)  # a batch is no larger than the images are
    assert len(batch[0]) == 20


def test_counts_come_by_image_and_incomplete_ones_are_left_out(counts_dir):
    counts = read_counts(counts_dir)
    shuffled = np.random.default_rng(0).permutation(len(counts.indices))[1:]  # and one is missing
    columns = ("indices", "sigmas", "counts", "labels", "predictions", "p_lower")
    images, targets = group_counts_by_image(
        replace(counts, **{name: getattr(counts, name)[shuffled] for name in columns})
    )
    assert targets.shape == (99, 2, 1 + counts.counts.shape[1])
    for image, found in zip(images, targets.numpy()):
        for sigma, measured in zip((0.25, 1.0), found):
            (row,) = np.flatnonzero((counts.indices == image) & (counts.sigmas == sigma))
            np.testing.assert_array_equal(measured, [sigma, *counts.counts[row]])
