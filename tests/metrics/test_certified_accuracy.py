import csv
import io
import json
import re
import runpy
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from helpers.finished_runs import LOG
from helpers.paths import ROOT
from huggingface_hub import metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import hf_smoothing.metrics.certified_accuracy as package
from hf_smoothing import ABSTAIN, CertifiedAccuracy, GaussianNoise
from hf_smoothing.core.bounds import clopper_pearson_lower
from hf_smoothing.metrics.certified_accuracy import certified_accuracy, certified_accuracy_curve

FOLDER = str(Path(package.__file__).parent)

# right at .6 and .25, wrong, abstaining, right at 0, failed
HAND = {
    "predictions": [0, 0, 1, -1, 1, None],
    "references": [0, 0, 0, 1, 1, 2],
    "radii": [0.6, 0.25, 0.9, 0.0, 0.0, None],
    "guarantees": ["per_input"] * 5 + [None],
    "p_lower": [0.99, 0.8, 0.999, 0.0, 0.5, None],
    "num_samples": [100, 300, 50, 1000, 800, None],
    "alphas": [0.01] * 5 + [None],
}
REQUIRED = {name: HAND[name] for name in ("predictions", "references", "radii")}


def shares(found):
    return [row["share"] for row in found["certified_accuracy"]]


def test_a_case_computed_by_hand():
    found = certified_accuracy(**HAND, thresholds=[0, 0.25, 0.250001, 0.5, 0.7])
    assert [row["right"] for row in found["certified_accuracy"]] == [3, 2, 1, 1, 0]
    assert shares(found) == [3 / 6, 2 / 6, 1 / 6, 1 / 6, 0]
    assert found["certified_accuracy"][1]["interval_95"] == pytest.approx(
        [stats.beta.ppf(0.025, 2, 5), stats.beta.ppf(0.975, 3, 4)]
    )
    assert found["certified_accuracy"][4]["interval_95"] == pytest.approx([0, 1 - 0.025 ** (1 / 6)])
    assert (found["num_images"], found["num_failed"]) == (6, 1)
    assert found["certified_accuracy_at_0"] == 3 / 6
    assert found["abstention_rate"] == 1 / 6
    assert found["mean_certified_radius"] == pytest.approx(0.85 / 6)
    assert (found["guarantee"], found["alpha"]) == ("per_input", 0.01)
    assert (found["expected_wrong"], found["most_wrong"]) == (0.05, 0)
    assert [row["net_of_alpha"] for row in found["certified_accuracy"]] == shares(found)
    assert found["p_lower_quartiles"] == pytest.approx(np.quantile([0.99, 0.8, 0, 0, 0.5, 0], [0.25, 0.5, 0.75]))
    assert found["median_num_samples"] == 300
    assert json.loads(json.dumps(found)) == found
    assert certified_accuracy.__globals__["ABSTAIN"] == ABSTAIN


def test_the_definition_of_the_literature_on_the_format_of_its_logs():
    rows = list(csv.DictReader(io.StringIO(LOG), delimiter="\t"))
    correct, radius = (np.array([float(row[name]) for row in rows]) for name in ("correct", "radius"))
    columns = ([float(row[name]) for row in rows] for name in ("predict", "label", "radius"))
    thresholds = np.linspace(0, 1, 41)
    # Cohen et al., ApproximateAccuracy.at_radius
    wanted = [(correct * (radius >= threshold)).mean() for threshold in thresholds]
    assert shares(certified_accuracy(*columns, thresholds)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"radii": [np.nan, 0.25, 0.9, 0, 0, None]}, r"radii\[0\]=nan"),
        ({"radii": [0.6, -0.25, 0.9, 0, 0, None]}, r"radii\[1\]=-0.25"),
        ({"radii": [0.6, np.inf, 0.9, 0, 0, None]}, r"radii\[1\]=inf"),
        ({"radii": [0.6, 0.25, 0.9, 0.3, 0, None]}, r"radii\[3\]=0.3 must be 0, since the prediction abstains"),
        ({"radii": [0.6]}, "6 predictions, 6 references, 1 radii"),
        ({"predictions": [0.5, 0, 1, -1, 1, None]}, r"predictions\[0\]=0.5"),
        ({"predictions": [0, 0, 1, -2, 1, None]}, r"predictions\[3\]=-2"),
        ({"predictions": ["cat"] * 6}, "predictions must hold one number per image"),
        ({"references": [0, 0, 0, -1, 1, 2]}, r"references\[3\]=-1 .* need labels"),
        ({"guarantees": ["per_input"] * 4 + ["none", None]}, r"none, per_input\) do not make one figure"),
        ({"guarantees": ["per_input"] * 4 + [None, None]}, r"per_input, unknown\) do not make one figure"),
        ({"guarantees": ["surely"] * 6}, "'surely'; choose from per_input, marginal, selected, none"),
        ({"alphas": [0.01] * 4 + [0.001, None]}, r"alphas \(0.001, 0.01\) do not make one figure"),
        ({"alphas": [0.01] * 4 + [None, None]}, r"alphas \(0.01, unknown\) do not make one figure"),
        ({"alphas": [0.01] * 4 + [0, None]}, r"alphas\[4\]=0 must be a probability above 0"),
        ({"num_results": 0}, "num_results=0 must be an integer"),
        ({"p_lower": [1.1] * 6}, r"p_lower\[0\]=1.1"),
        ({"num_samples": [-5] * 6}, r"num_samples\[0\]=-5"),
        ({"thresholds": [0.5, -0.25]}, r"thresholds=\[0.5, -0.25\]"),
        ({"thresholds": []}, r"thresholds=\[\]"),
        ({"thresholds": 0.5}, r"thresholds=0.5 must be a list"),
        ({name: [] for name in HAND}, "no images"),
    ],
)
def test_bad_input_is_named(changed, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        certified_accuracy(**HAND | changed)
    metric = CertifiedAccuracy(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=said if "thresholds" not in changed else "thresholds="):
        metric.compute(**HAND | changed)
    assert metric.compute(**HAND) == certified_accuracy(**HAND)  # an error leaves nothing behind


@pytest.mark.parametrize("num_results", [1, 3])
def test_the_bound_net_of_alpha_holds_for_whole_tables(num_results):
    """
    Clopper-Pearson certificates at their weakest: 60 of 80 draws or more, which happens with probability alpha, claim a
    radius that is slightly too large. A table is wrong if any of its bounds exceeds the true certified accuracy.
    """
    alpha, images, draws, tables = 0.05, 100, 80, 40_000
    generator = np.random.default_rng(7)
    p = clopper_pearson_lower(60, draws, alpha) - 1e-9
    noise = GaussianNoise(1.0)
    radius_of = [noise.radius(clopper_pearson_lower(hits, draws, alpha)) for hits in range(draws + 1)]
    hits = generator.binomial(draws, p, (tables, num_results, images))
    wrong = (np.array(radius_of)[hits] > noise.radius(p)).sum(2)
    assert wrong.mean() == pytest.approx(alpha * images, rel=0.02)

    def net_beyond_the_true_radius(number):
        """The true certified accuracy there is 0."""
        radii = [radius_of[60]] * number + [0.0] * (images - number)
        given = {"guarantees": ["per_input"] * images, "alphas": [alpha] * images, "num_results": num_results}
        found = certified_accuracy([0] * images, [0] * images, radii, [radius_of[60]], **given)
        return found["certified_accuracy"][0]["net_of_alpha"]

    net = np.array([net_beyond_the_true_radius(number) for number in range(wrong.max() + 2)])
    error = 4 * np.sqrt(0.05 * 0.95 / tables)
    assert (net[wrong] > 0).any(1).mean() <= 0.05 + error
    assert (net[wrong + 1] > 0).any(1).mean() > 0.05 + error  # deducting one less is not enough


def test_no_bound_net_of_alpha_without_what_it_rests_on():
    for missing in ("guarantees", "alphas"):
        found = certified_accuracy(**{name: column for name, column in HAND.items() if name != missing})
        assert found["most_wrong"] is found["expected_wrong"] is found["certified_accuracy"][0]["net_of_alpha"] is None
    estimated = certified_accuracy(**HAND | {"guarantees": ["none"] * 6})
    assert (estimated["alpha"], estimated["most_wrong"]) == (0.01, None)


radii = st.floats(0, 4, allow_nan=False)
images = st.lists(
    st.tuples(st.integers(-1, 3), st.integers(0, 3), radii).map(
        lambda image: (image[0], image[1], 0.0 if image[0] == -1 else image[2])
    ),
    min_size=1,
    max_size=40,
)


@given(images, st.lists(radii, min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_properties(found, thresholds, random):
    result = certified_accuracy(*zip(*found), sorted(thresholds))
    assert all(0 <= share <= 1 for share in shares(result))
    assert shares(result) == sorted(shares(result), reverse=True)
    for row in result["certified_accuracy"]:
        low, high = row["interval_95"]
        assert 0 <= low <= row["share"] <= high <= 1
    assert shares(result)[0] <= result["certified_accuracy_at_0"] <= 1 - result["abstention_rate"]
    shuffled = random.sample(found, len(found))
    other = certified_accuracy(*zip(*shuffled), sorted(thresholds))
    assert shares(other) == shares(result)
    assert other["mean_certified_radius"] == pytest.approx(result["mean_certified_radius"])
    # one wrong image more never raises a share
    assert all(
        np.less_equal(shares(certified_accuracy(*zip(*found, (-1, 0, 0.0)), sorted(thresholds))), shares(result))
    )


@given(images, radii)
@settings(max_examples=60, deadline=None)
def test_the_curve_is_exact_everywhere(found, threshold):
    corners, heights = certified_accuracy_curve(*zip(*found))
    assert corners[0] == 0
    assert (np.diff(corners) > 0).all()
    for level in (threshold, *corners, *np.nextafter(corners, np.inf)):
        at = np.searchsorted(corners, level, side="left")
        assert shares(certified_accuracy(*zip(*found), [level])) == [heights[at] if at < len(heights) else 0]


@pytest.fixture(params=["class", "folder"])
def metric(request, tmp_path):
    if request.param == "class":
        return CertifiedAccuracy(cache_dir=str(tmp_path))
    return evaluate.load(FOLDER, cache_dir=str(tmp_path))


def test_the_metric_of_evaluate(metric):
    thresholds = [0, 0.25, 0.5]
    wanted = certified_accuracy(**HAND, thresholds=thresholds)
    assert metric.compute(**HAND, thresholds=thresholds) == wanted
    assert metric.compute(**REQUIRED) == certified_accuracy(**REQUIRED)
    assert metric.compute(**HAND, num_results=3) == certified_accuracy(**HAND, num_results=3)
    for chosen in (slice(0, 1), slice(1, 4), slice(4, 6)):
        metric.add_batch(**{name: column[chosen] for name, column in HAND.items()})
    assert metric.compute(thresholds=thresholds) == wanted
    names = {"predictions": "prediction", "references": "reference"}
    for image in zip(*HAND.values()):
        metric.add(**{names.get(name, name): value for name, value in zip(HAND, image)})
    assert metric.compute(thresholds=thresholds) == wanted


def test_the_folder_is_a_space():
    """The page's function; the page itself takes gradio."""
    facts = metadata_load(Path(FOLDER) / "README.md")
    assert facts["sdk"] == "gradio"
    assert {"evaluate", "metric"} <= set(facts["tags"])
    needed = (Path(FOLDER) / "requirements.txt").read_text().split()
    assert {re.split("[>=]", one)[0] for one in needed} == {"datasets", "evaluate", "numpy", "scipy"}
    compute = runpy.run_path(str(Path(FOLDER) / facts["app_file"]))["compute"]
    rows = [["0", "0", "0.6"], [0, 0, 0.25], [-1, 1, 0.0], ["", "", ""]]
    assert compute(rows, "0, 0.5") == certified_accuracy([0, 0, -1], [0, 0, 1], [0.6, 0.25, 0.0], [0, 0.5])
    with pytest.raises(ValueError, match="integer"):
        compute([[0.5, 0, 0.1]], "0")


def test_tensors_and_arrays_keep_full_precision(metric):
    radius = 0.1 + 1e-12
    metric.add_batch(
        predictions=torch.tensor([1]), references=torch.tensor([1]), radii=torch.tensor([radius]).double()
    )
    metric.add_batch(predictions=np.array([1]), references=np.array([1]), radii=np.array([np.nextafter(radius, 0)]))
    assert shares(metric.compute(thresholds=[radius])) == [0.5]


def test_guarantees_and_alphas_are_not_mixed_between_batches_either(metric):
    for guarantee in ("per_input", "marginal"):
        metric.add_batch(predictions=[1], references=[1], radii=[0.1], guarantees=[guarantee])
    with pytest.raises(ValueError, match="marginal, per_input"):
        metric.compute()
    for alpha in (0.1, 0.2):
        metric.add_batch(predictions=[1], references=[1], radii=[0.1], alphas=[alpha])
    with pytest.raises(ValueError, match=r"alphas \(0.1, 0.2\)"):
        metric.compute()
    assert metric.compute(**HAND) == certified_accuracy(**HAND)


def test_batches_have_the_same_columns(metric):
    metric.add_batch(predictions=[1], references=[1], radii=[0.1])
    with pytest.raises(ValueError, match="the first one had predictions, references, radii"):
        metric.add_batch(predictions=[1], references=[1], radii=[0.1], num_samples=[5])
    metric.compute()
    with pytest.raises(ValueError, match="radii missing"):
        metric.add_batch(predictions=[1], references=[1])
    with pytest.raises(ValueError, match="no column 'radius'"):
        metric.compute(predictions=[1], references=[1], radius=[0.1])


def test_combine(tmp_path):
    class Seen(evaluate.Metric):
        def _info(self):
            features = CertifiedAccuracy()._info().features
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions, references, radii):
            return {"seen": len(predictions)}

    combined = evaluate.combine([CertifiedAccuracy(cache_dir=str(tmp_path)), Seen(cache_dir=str(tmp_path))])
    combined.add_batch(**REQUIRED)
    assert combined.compute() == {**certified_accuracy(**REQUIRED), "seen": 6}
    pair = evaluate.combine({"a": CertifiedAccuracy(cache_dir=str(tmp_path)), "b": evaluate.load(FOLDER)})
    found = pair.compute(**HAND, thresholds=[0.25])
    assert found["a_certified_accuracy"] == found["b_certified_accuracy"]
    assert found["a_guarantee"] == "per_input"


def test_two_processes_gather(processes, tmp_path):
    generator = np.random.default_rng(0)
    predictions = generator.integers(-1, 3, 37)
    columns = {
        "predictions": predictions.tolist(),
        "references": generator.integers(0, 3, 37).tolist(),
        "radii": np.where(predictions < 0, 0, generator.random(37)).tolist(),
    }
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    script = ROOT / "tests" / "helpers" / "gather_certificates.py"
    ranks = processes.start_ranks(2, script, FOLDER, tmp_path / "columns.json", tmp_path / "found.json")
    for done in [process.finish() for process in ranks]:
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("processes") == 2
    assert found == certified_accuracy(**columns, thresholds=[0, 0.25, 0.5])
