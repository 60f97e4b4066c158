"""Certified accuracy of many images from certificates of a few: what the intervals cover, and what they save."""

import numpy as np
import pytest
from scipy import stats

from hf_smoothing import CertifiedAccuracy
from hf_smoothing.metrics.certified_accuracy import certified_accuracy
from hf_smoothing.metrics.certified_accuracy.shares import exact_interval, share_of_sample

RESAMPLINGS = 2000


def draw_sample(generator, images, size):
    sampled = np.zeros(images, bool)
    sampled[generator.choice(images, size, replace=False)] = True
    return sampled


def estimates_with_errors(generator, truth, errors):
    return np.where(generator.random(len(truth)) < errors, ~truth, truth)


@pytest.mark.parametrize("size", [100, 500])
@pytest.mark.parametrize(("share", "errors"), [(0.42, 0.07), (0.42, 0.5), (0.1, 0.3), (0.05, 0.02)])
def test_intervals_cover_the_share_of_all_images(share, errors, size):
    """For good, useless and in part wrong estimates: 94 %, less what 2,000 resamplings leave open."""
    generator = np.random.default_rng(0)
    truth = generator.random(10_000) < share
    estimated = estimates_with_errors(generator, truth, errors)
    covered = 0
    for _ in range(RESAMPLINGS):
        sampled = draw_sample(generator, len(truth), size)
        _, (low, high) = share_of_sample(truth[sampled], estimated, sampled)
        covered += low <= truth.mean() <= high
    assert stats.binomtest(covered, RESAMPLINGS, 0.94, alternative="less").pvalue > 0.001


def test_good_estimates_save_certificates():
    """Against the exact binomial interval of the same sample: a width w takes a number of images that goes with 1/w^2."""
    generator = np.random.default_rng(0)
    truth = generator.random(10_000) < 0.42
    estimated = estimates_with_errors(generator, truth, 0.12)
    saved = []
    for _ in range(50):
        sampled = draw_sample(generator, len(truth), 500)
        _, (low, high) = share_of_sample(truth[sampled], estimated, sampled)
        exact_low, exact_high = exact_interval(int(truth[sampled].sum()), 500)
        saved.append(((exact_high - exact_low) / (high - low)) ** 2)
    assert np.mean(saved) > 1.8


def test_a_sample_of_all_images_leaves_no_doubt():
    truth, estimated = np.array([True, False, True, True]), np.array([True, True, False, False])
    assert share_of_sample(truth, estimated, np.ones(4, bool)) == (0.75, [0.75, 0.75])


def test_a_part_without_a_sample_is_unknown():
    estimated, sampled = np.array([True, True, False, False]), np.array([True, True, False, False])
    share, (low, high) = share_of_sample(np.array([True, True]), estimated, sampled)
    assert (share, low, high) == (0.75, 0.5, 1.0)


def test_the_metric_reads_certificates_of_the_sample_only():
    """Right at .6 and abstaining in the sample; by the head, three of four are right at .25 or more."""
    columns = {
        "predictions": [0, None, None, -1],
        "references": [0, 0, 1, 1],
        "radii": [0.6, None, None, 0.0],
        "estimated_predictions": [0, 0, 1, 0],
        "estimated_radii": [0.5, 0.3, 0.4, 0.1],
        "sampled": [True, False, False, True],
    }
    found = certified_accuracy(**columns, thresholds=[0.25])
    assert (found["num_images"], found["num_sampled"], found["num_failed"]) == (4, 2, 0)
    (row,) = found["certified_accuracy"]
    assert (row["right"], row["share"], row["estimated_share"], row["net_of_alpha"]) == (1, 0.75, 0.75, None)
    assert CertifiedAccuracy().compute(**columns, thresholds=[0.25]) == found
    with pytest.raises(ValueError, match="give all three"):
        certified_accuracy(**{**columns, "sampled": None})
    with pytest.raises(ValueError, match="3 sampled"):
        certified_accuracy(**{**columns, "sampled": [True] * 3})
