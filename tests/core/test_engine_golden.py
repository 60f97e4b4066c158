"""
Certificates of a small classifier are those of the file, whatever the batch size and the order.

Where a rule is meant to decide otherwise, write `engine_golden.json` again with `python tests/core/test_engine_golden.py`,
and say in the commit what changed and why.
"""

import json
from pathlib import Path

import pytest
import torch

from hf_smoothing import FixedRule, GaussianNoise, LaplaceNoise, SequentialRule, SmoothedClassifier, TwoStageRule
from hf_smoothing.core.base_classifier import BaseClassifier
from hf_smoothing.core.count_rule import CountRule
from hf_smoothing.core.sampler import Sampler

GOLDEN = Path(__file__).with_name("engine_golden.json")
NUM_CLASSES = 5
RULES = {
    "decide": SequentialRule(radii=(0.1, 0.3), max_draws=800),
    "find": TwoStageRule(draws=300, max_draws=600),
    "fixed": FixedRule(n0=10, n=90),
    "predict": SequentialRule(radii=(0.0,), max_draws=60, alpha=0.01),
    "counts": CountRule(37),
}
CASES = [(name, kind) for name in RULES for kind in (GaussianNoise, LaplaceNoise)]
CASES += [("guided decide", GaussianNoise), ("guided find", GaussianNoise)]


def make_images():
    """Ten 8-bit pictures, and ten between the levels."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 256, (10, 3, 4, 4), generator=generator) / 255
    return [*levels, *torch.rand(10, 3, 4, 4, generator=generator)]


def classify(pixels):
    directions = torch.randn(48, NUM_CLASSES, generator=torch.Generator().manual_seed(4))
    # the products in steps of 2^-12 are sums without rounding: logits do not depend on the batch size
    directions = (directions * 2**6).round() / 2**6
    return (((pixels.flatten(1) - 0.5) * 4080).round() @ directions) + torch.arange(NUM_CLASSES) * 2**-8


def predict_counts(pixels, sigma):
    return (classify(pixels) / 4080 / sigma).double().softmax(1)


def certify(name, kind, batch_size=32, order=None):
    rule = RULES[name.removeprefix("guided ")]
    images = make_images()
    order = order or list(range(len(images)))
    head = predict_counts if name.startswith("guided") else None
    smoothed = SmoothedClassifier(classify, kind(0.25), batch_size=batch_size, count_head=head)
    stream = smoothed.certify_stream([images[index] for index in order], rule, seed=7)
    rows = [[order[position], c.prediction, c.radius, list(c.counts), c.num_samples] for position, c in stream]
    return sorted(rows)


@pytest.mark.parametrize("batch_size", [1, 7, 128, 1024])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_certificates_are_those_of_the_file(name, kind, batch_size):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(batch_size)).tolist()
    compare(certify(name, kind, batch_size, order), f"{name} {kind.name}")


def compare(rows, case):
    for row, expected in zip(rows, json.loads(GOLDEN.read_text())[case], strict=True):
        assert row.pop(2) == pytest.approx(expected.pop(2), rel=1e-9)
        assert row == expected


@pytest.mark.parametrize("batch_size", [1, 7, 128])
@pytest.mark.parametrize("name", [*RULES, "guided decide", "guided find"])
def test_a_second_batch_in_flight_changes_nothing(name, batch_size):
    """As on CUDA, here on the CPU."""
    sampler = Sampler(
        BaseClassifier(classify),
        GaussianNoise(0.25),
        RULES[name.removeprefix("guided ")],
        seed=7,
        batch_size=batch_size,
        count_head=predict_counts if name.startswith("guided") else None,
        batches_ahead=1,
    )
    rows = []
    for finished in sampler.sample(make_images()):
        outcomes = finished.outcomes
        columns = (
            finished.positions, outcomes.predictions, outcomes.radii, finished.counts.tolist(), finished.num_samples,
        )  # fmt: skip
        rows += map(list, zip(*columns))
    compare(sorted(rows), f"{name} gaussian")


if __name__ == "__main__":
    lines = [f'"{name} {kind.name}": {json.dumps(certify(name, kind))}' for name, kind in CASES]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
