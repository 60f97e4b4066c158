import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_smoothing import Certificate, GaussianNoise, SmoothedClassifier, UniformNoise, format_radius

CERTIFICATE = Certificate(
    prediction=1, radius=0.5, guarantee="per_input", method="fixed", noise="gaussian", norm="l2", sampling="lattice",
    sigma=0.5, alpha=0.001, p_lower=0.8, p_upper=0.2, counts=(1, 2), num_samples=3, seed=0, dtype="float32",
    dimensions=3072,
)  # fmt: skip


def test_radii_are_rounded_down():
    assert format_radius(0.24999) == "0.249"
    assert format_radius(0.3, 1) == "0.2"  # 0.3 is 0.29999999999999998...
    assert format_radius(1.0) == "1.000"
    assert format_radius(float("inf")) == "inf"


def test_certificate_as_a_dict():
    certificate = replace(CERTIFICATE, prediction=-1, radius=0.0)
    assert certificate.abstains
    assert certificate.to_dict()["counts"] == [1, 2]
    assert certificate.to_dict()["dimensions"] == 3072


@pytest.mark.parametrize(
    ("norm", "radii"),
    [
        ("l1", {"l1": 0.5, "l2": 0.5 / math.sqrt(3072), "linf": 0.5 / 3072}),
        ("l2", {"l1": 0.5, "l2": 0.5, "linf": 0.5 / math.sqrt(3072)}),
        ("linf", {"l1": 0.5, "l2": 0.5, "linf": 0.5}),
    ],
)
def test_radii_in_other_norms(norm, radii):
    certificate = replace(CERTIFICATE, norm=norm)
    assert {name: certificate.radius_in(name) for name in radii} == pytest.approx(radii, rel=1e-14)


@pytest.mark.parametrize("own", ["l1", "l2", "linf"])
@pytest.mark.parametrize("other", ["l1", "l2", "linf"])
def test_a_radius_in_another_norm_is_valid_and_the_largest(own, other):
    orders = {"l1": 1, "l2": 2, "linf": np.inf}
    certificate = replace(CERTIFICATE, norm=own, dimensions=12)
    generator = np.random.default_rng(0)
    changes = np.concatenate([generator.standard_normal((1000, 12)), np.eye(12), np.ones((1, 12))])
    changes *= certificate.radius_in(other) / np.linalg.norm(changes, orders[other], axis=1, keepdims=True)
    reached = np.linalg.norm(changes, orders[own], axis=1)
    assert reached.max() == pytest.approx(certificate.radius, rel=1e-12)


def test_a_radius_in_another_norm_takes_the_dimensions():
    old = replace(CERTIFICATE, dimensions=None)
    assert old.radius_in("l1") == old.radius_in("l2") == 0.5  # their factor is 1 in all dimensions
    assert replace(old, radius=0.0).radius_in("linf") == 0
    with pytest.raises(ValueError, match="dimensions=None"):
        old.radius_in("linf")
    with pytest.raises(ValueError, match="norm='max' is unknown; choose from l1, l2, linf"):
        old.radius_in("max")


@pytest.mark.parametrize("noise", [GaussianNoise(0.25), UniformNoise(0.25)])
def test_a_certificate_knows_its_dimensions(linear, noise):
    images = torch.full((2, 3, 4, 4), 0.5)
    for certificate in SmoothedClassifier(linear, noise).certify(images, n=10, n0=1, method="fixed"):
        assert certificate.dimensions == 48
