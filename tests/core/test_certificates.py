from hf_smoothing import Certificate, format_radius


def test_radii_are_rounded_down():
    assert format_radius(0.24999) == "0.249"
    assert format_radius(0.3, 1) == "0.2"  # 0.3 is 0.29999999999999998...
    assert format_radius(1.0) == "1.000"
    assert format_radius(float("inf")) == "inf"


def test_certificate_as_a_dict():
    certificate = Certificate(
        prediction=-1, radius=0.0, guarantee="per_input", method="fixed", noise="gaussian", norm="l2",
        sampling="float", sigma=0.5,
        alpha=0.001, p_lower=0.0, p_upper=1.0, counts=(1, 2), num_samples=3, seed=0, dtype="float32",
    )  # fmt: skip
    assert certificate.abstains
    assert certificate.to_dict()["counts"] == [1, 2]
