import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.finished_runs import LOG, write_log, write_run
from helpers.paths import ROOT, SHIPPED_MODEL
from matplotlib.figure import Figure
from PIL import Image

from hf_smoothing import load_demo_images
from hf_smoothing.metrics.certified_accuracy import certified_accuracy
from hf_smoothing.reporting.examples import load_pictures, picture_of_certificates
from hf_smoothing.reporting.plots import draw_certified_accuracy
from hf_smoothing.reporting.report import (
    other_rows,
    render_notes,
    render_report,
    share_rows,
    summarize,
)
from hf_smoothing.reporting.results import read_results


def test_the_picture(tmp_path):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    path = tmp_path / "certificates.png"
    rows = [
        {"prediction": 0, "prediction_name": "cat", "label": 0, "label_name": "cat", "radius": 0.25},
        {"prediction": -1, "prediction_name": None, "label": 1, "label_name": "dog", "radius": 0.0},
        {"prediction": 1, "label": 0, "radius": 0.5},
    ]
    picture_of_certificates(pictures.__getitem__, rows, "title", path)
    assert Image.open(path).width > 500


def test_a_run_of_several_sigmas(tmp_path):
    results = read_results([write_run(tmp_path / "run", (0.25, 0.5))])
    assert [(result.title, result.alpha, result.guarantee, len(result.rows)) for result in results] == [
        ("run, sigma = 0.25", 0.001, "per_input", 60),
        ("run, sigma = 0.5", 0.001, "per_input", 60),
    ]
    report = summarize(results, [0, 0.25])
    for result, entry in zip(results, report["results"]):
        right = [row["prediction"] == row["label"] for row in result.rows]
        assert entry["num_failed"] == 1
        assert [row["right"] for row in entry["certified_accuracy"]] == [
            sum(right),
            sum(hit and row["radius"] >= 0.25 for hit, row in zip(right, result.rows)),
        ]
        assert entry["median_num_samples"] == np.median(
            [row["num_samples"] for row in result.rows if row["num_samples"]]
        )
    assert json.loads(json.dumps(report)) == report
    report["pictures"] = [{"kind": "certified_accuracy", "title": "Curves", "file": "curves.png"}]
    page = render_report(report)
    assert page.count("\n| run | ") == 3  # the heading, and one row per sigma
    for text in ("2410.06895", "](curves.png)", "scripts/certify.py"):
        assert text in page


def test_an_image_without_a_sigma_counts_once_at_every_one(tmp_path):
    folder = write_run(tmp_path / "run", (0.25, 0.5))
    rows = pq.read_table(folder / "certificates.parquet").to_pylist()
    rows = [row | {"sigma": None} if row["error"] else row for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "certificates.parquet")
    assert [len(result.rows) for result in read_results([folder])] == [60, 60]


def test_an_image_twice_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = pq.read_table(folder / "certificates.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, rows[3]]), folder / "certificates.parquet")
    with pytest.raises(ValueError, match="image 60 twice"):
        read_results([folder])


def test_the_log_of_a_research_script(tmp_path):
    (result,) = read_results([write_log(tmp_path / "cohen.tsv")])
    assert (result.sigma, result.alpha, result.guarantee) == (None, None, None)
    report = summarize([result], [0, 0.25, 0.5])
    entry = report["results"][0]
    assert [row["right"] for row in entry["certified_accuracy"]] == [2, 2, 1]
    assert entry["abstention_rate"] == 0.25
    assert entry["mean_seconds"] == pytest.approx((17.341 + 16.2 + 60 + 16.000001) / 4)
    assert share_rows(report)[0]["sigma"] == other_rows(report)[0]["median\npasses"] == "unknown"
    assert "guarantee is unknown" in render_notes(report)
    assert "as claimed" in render_report(report)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("idx label predict radius\n1 2 2 0.5\n", "lacks the columns"),
        (LOG + "80\t1", "line 6"),
        (LOG + "80\t1\t1\t0.5\t1", "line 6.* columns idx, label, predict, radius, correct, time"),
        (LOG + "80\t1\t1\t0.5\t1\t0:00:01\t7\n", "line 6"),
        (LOG + "80\t1\t1\t0.5\t1\tyesterday\n", "line 6.*yesterday"),
        (LOG + "80\t1\t1\t0.5\t0\t0:00:01\n", "correct=0 with label 1 and prediction 1"),
        (LOG + "60\t6\t6\t0.25\t1\t0:00:16\n", "image 60 twice"),
        (LOG.splitlines()[0], "no certificates"),
    ],
)
def test_broken_logs_are_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_results([write_log(tmp_path / "bad.tsv", text)])


def test_a_picture_may_take_days(tmp_path):
    text = LOG + "80\t1\t1\t0.5\t1\t1 day, 0:00:17\n100\t1\t1\t0.5\t1\t12 days, 1:00:00.5\n"
    (result,) = read_results([write_log(tmp_path / "slow.tsv", text)])
    assert result.column("seconds")[-2:] == [86417, 12 * 86400 + 3600.5]


def test_logs_are_told_apart_by_their_files(tmp_path):
    results = read_results([write_log(tmp_path / name) for name in ("a.tsv", "b.tsv")])
    assert [result.title for result in results] == ["a.tsv", "b.tsv"]


def test_a_run_is_named_once(tmp_path):
    folder = write_run(tmp_path / "run")
    for again in (folder, folder / "certificates.parquet", tmp_path / "run" / ".." / "run"):
        with pytest.raises(ValueError, match="is given twice"):
            read_results([folder, again])


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder or log"):
        read_results([tmp_path / "gone"])
    with pytest.raises(FileNotFoundError, match="is the run finished"):
        read_results([tmp_path])
    pq.write_table(pa.table({"index": [1]}), tmp_path / "certificates.parquet")
    with pytest.raises(ValueError, match="lacks the columns"):
        read_results([tmp_path])
    (tmp_path / "certificates.parquet").write_text("torn")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_results([tmp_path])


@pytest.mark.parametrize(
    ("runs", "label"),
    [
        ([{"sigmas": (0.25, 0.5)}], "best of several sigmas of one model"),
        ([{}, {"model": "user/other"}], "best of several models"),
        ([{}, {"model": "user/other", "sigmas": (0.5,)}], "best of several models and sigmas"),
        ([{}, {"seed": 1}], "best of several runs of one model"),
        ([{}, {"model": None, "sigmas": (0.5,)}], "best of several results, whose models are not all known"),
    ],
)
def test_the_envelope_says_what_it_is(tmp_path, runs, label):
    results = read_results([write_run(tmp_path / str(number), **run) for number, run in enumerate(runs)])
    report = summarize(results, [0, 0.25, 0.5], envelope=True)
    assert report["envelope"]["label"] == label
    for *all_shares, best in zip(
        *([row["share"] for row in entry["certified_accuracy"]] for entry in [*report["results"], report["envelope"]])
    ):
        assert best == max(all_shares)
    assert share_rows(report)[-1]["run"] == label
    assert summarize(results)["envelope"] is None


def test_an_envelope_takes_the_same_images(tmp_path):
    results = read_results([write_run(tmp_path / "a"), write_run(tmp_path / "b", images=30)])
    with pytest.raises(ValueError, match="same images"):
        summarize(results, envelope=True)
    with pytest.raises(ValueError, match="two results or more"):
        summarize(results[:1], envelope=True)


def test_radii_that_were_decided_are_the_ones_reported(tmp_path):
    report = summarize(read_results([write_run(tmp_path / "run", radii=[0.1, 0.3])]))
    assert [row["radius"] for row in report["results"][0]["certified_accuracy"]] == [0.1, 0.3]
    assert "0.1, 0.3 were decided" in render_notes(report)


def test_what_was_not_decided_is_marked_as_a_bound(tmp_path):
    report = summarize(read_results([write_run(tmp_path / "run", radii=[0.1, 0.3])]), [0, 0.1, 0.2, 0.5])
    (shares,), (others,) = share_rows(report), other_rows(report)
    assert [shares[f"r = {radius}"].startswith(">= ") for radius in ("0", "0.1", "0.2", "0.5")] == [
        True,
        False,
        True,
        True,
    ]
    assert ["-" in shares[f"r = {radius}"] for radius in ("0", "0.1", "0.2", "0.5")] == [False, True, False, False]
    assert (others["abstains"][:3], others["mean\nradius †"][:3]) == ("<= ", ">= ")
    assert "also at radius 0, and abstentions are at most" in render_notes(report)
    with_0 = summarize(read_results([write_run(tmp_path / "with-0", radii=[0, 0.3])]))
    assert share_rows(with_0)[0]["r = 0"][0].isdigit()
    assert other_rows(with_0)[0]["abstains"][0].isdigit()
    assert "radius 0 included" not in render_notes(with_0)


@pytest.mark.parametrize("run", [{}, {"radii": [0.1, 0.3], "method": "fixed"}])
def test_a_run_that_drew_on_has_no_floors(tmp_path, run):
    (result,) = read_results([write_run(tmp_path / "run", **run)])
    report = summarize([result])
    assert [row["radius"] for row in report["results"][0]["certified_accuracy"]] == run.get(
        "radii", [0, 0.25, 0.5, 0.75, 1]
    )
    assert result.standing(0.2) == "counted"
    assert "Each image's radius was found, so the shares hold at every radius." in render_notes(report)
    assert "stopped" not in render_notes(report)
    assert "=" not in other_rows(report)[0]["mean\nradius †"]


def two_sigmas(folder):
    """A run that decided 0.1 at both its noise levels, 0.4 at the larger one, where alone it is in reach."""
    write_run(folder, (0.25, 0.5), radii=[0.1, 0.4])
    run = json.loads((folder / "run.json").read_text())
    run["settings"]["radii_decided"] = {"0.25": [0.1], "0.5": [0.1, 0.4]}
    (folder / "run.json").write_text(json.dumps(run))
    return read_results([folder])


def test_fewer_radii_may_be_decided_at_a_small_sigma(tmp_path):
    small, large = two_sigmas(tmp_path / "run")
    assert (small.decided_radii, large.decided_radii) == ([0.1], [0.1, 0.4])
    radii = (0.05, 0.1, 0.2, 0.4, 0.5)
    assert [small.standing(radius) for radius in radii] == [
        "floor",
        "counted",
        "floor",
        "out of reach",
        "out of reach",
    ]
    assert [large.standing(radius) for radius in radii] == ["floor", "counted", "floor", "counted", "floor"]
    assert "cannot prove the radius 0.4 for any image" in render_notes(summarize([small, large]))


def test_the_envelope_is_known_only_where_a_radius_was_decided(tmp_path):
    results = two_sigmas(tmp_path / "run")
    rows = summarize(results, [0.05, 0.1, 0.2, 0.4, 0.5], envelope=True)["envelope"]["certified_accuracy"]
    assert [(row["radius"], row["standing"]) for row in rows] == [(0.1, "counted"), (0.4, "counted")]
    # beside a run that found each image's radius, it is known everywhere, and where the other did not decide a floor
    results.append(*read_results([write_run(tmp_path / "found", (0.5,), seed=1)]))
    report = summarize(results, [0.05, 0.1], envelope=True)
    assert [row["standing"] for row in report["envelope"]["certified_accuracy"]] == ["floor", "counted"]
    assert share_rows(report)[-1]["r = 0.05"].startswith(">= ")
    assert share_rows(report)[-1]["r = 0.1"][0].isdigit()


def drawn(results, envelope=None):
    """The lines of a picture by their labels, as radii and shares, and what the legend names."""
    axes = Figure().subplots()
    draw_certified_accuracy(axes, results, envelope)
    lines = axes.lines + [bars.lines[0] for bars in axes.containers]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}, axes


def test_decided_radii_are_drawn_as_points_with_their_intervals(tmp_path):
    small, large = two_sigmas(tmp_path / "run")
    points, axes = drawn([small, large], "best")
    rows = summarize([small, large], [0.1, 0.4])["results"]
    shares = [[row["share"] for row in entry["certified_accuracy"]] for entry in rows]
    assert [bars.get_label() for bars in axes.containers] == [small.title, large.title]
    assert [segment[:, 1].tolist() for segment in axes.containers[1].lines[2][0].get_segments()] == [
        pytest.approx(row["interval_95"]) for row in rows[1]["certified_accuracy"]
    ]
    drawings = [list(bars.lines[0].get_xydata()[:, 1]) for bars in axes.containers]
    assert drawings == [shares[0][:1], shares[1]]
    assert points["best"] == ([0.1, 0.4], [max(share for share in at if share is not None) for at in zip(*shares)])


def test_found_radii_are_drawn_as_exact_steps(tmp_path):
    results = read_results([write_run(tmp_path / "run", (0.25, 0.5))])
    lines, axes = drawn(results, "best")
    assert not axes.containers
    assert {line.get_drawstyle() for line in axes.lines} == {"steps-pre"}
    for result in results:
        radii, shares = lines[result.title]
        right = [row["radius"] for row in result.rows if row.get("prediction") == row["label"]]
        assert radii[1:-1] == sorted(set(right))
        assert shares[0] == len(right) / 60
    assert set(lines["best"][0]) == {radius for result in results for radius in lines[result.title][0]}


def test_pictures_of_other_data_are_refused(tmp_path):
    (result,) = read_results([SHIPPED_MODEL / "results" / "demo"])
    data = str(ROOT / "hf_smoothing" / "data" / "cifar10_demo.parquet")
    rows, picture = load_pictures(result, data, "test")
    assert len(rows) == 200
    assert picture(7).tobytes() == load_demo_images()[7]["image"].tobytes()
    for row in result.rows:
        row["index"] = 199 - row["index"]
    with pytest.raises(ValueError, match="another label"):
        load_pictures(result, data, "test")
    result.rows[0]["index"] = 200
    with pytest.raises(ValueError, match="has 200 images"):
        load_pictures(result, data, "test")


def run_over(data, tmp_path, **settings):
    """A finished run over the rows of `data`, whose model has three of the classes, `Cat`, `dog` and `Tree-Frog`."""
    folder = write_run(tmp_path / "run", images=9)
    rows = pq.read_table(folder / "certificates.parquet").to_pylist()
    for position, row in enumerate(rows):
        row["index"] = position
    pq.write_table(pa.Table.from_pylist(rows), folder / "certificates.parquet")
    run = json.loads((folder / "run.json").read_text())
    run["settings"] |= {"dataset_name": str(data), "label_names": ["Cat", "dog", "Tree-Frog"], **settings}
    (folder / "run.json").write_text(json.dumps(run))
    return read_results([folder])[0]


def save(path, picture_column, label_column, names=("dog", "tree_frog", "cat")):
    """Nine pictures, labelled cat, dog, frog and so on; with another column of pictures, and of labels."""
    model_names = ["cat", "dog", "tree_frog"]
    pictures = [Image.new("RGB", (8, 8), (20 * position, 0, 0)) for position in range(9)]
    labels = [names.index(model_names[position % 3]) for position in range(9)]
    data = datasets.Dataset.from_dict(
        {picture_column: pictures, label_column: labels, "mask": pictures, "coarse": [0] * 9},
        datasets.Features(
            {
                picture_column: datasets.Image(),
                label_column: datasets.ClassLabel(names=list(names)),
                "mask": datasets.Image(),
                "coarse": datasets.Value("int64"),
            }
        ),
    )
    data.to_parquet(path)
    return path


def test_the_data_certified_are_known_by_the_columns_and_classes_of_the_run(tmp_path):
    data = save(tmp_path / "data.parquet", "photo", "kind")
    result = run_over(data, tmp_path, image_column="photo", label_column="kind", dataset_config_name="default")
    copies = [
        data,
        save(tmp_path / "copy.parquet", "photo", "kind"),
        save(tmp_path / "usual.parquet", "image", "label"),
    ]
    for copy in copies:
        rows, picture = load_pictures(result, str(copy))
        assert [row["index"] for row in rows] == [0, 1, 3, 4, 5, 6, 7, 8]  # the third one failed
        assert picture(2).getpixel((0, 0)) == (60, 0, 0)
    assert len(load_pictures(result, str(data), "test[:9]")[0]) == 8
    with pytest.raises(ValueError, match="has 3 images"):
        load_pictures(result, str(data), "test[:3]")
    with pytest.raises(ValueError, match="classes of dataset and model do not match"):
        load_pictures(
            result, str(save(tmp_path / "other.parquet", "photo", "kind", ("dog", "cat", "tree_frog", "fox")))
        )


def test_the_shipped_results_are_what_the_metric_makes_of_their_records():
    (result,) = read_results([SHIPPED_MODEL / "results" / "demo"])
    demo = json.loads((SHIPPED_MODEL / "results" / "demo" / "demo.json").read_text())
    columns = (result.column(name) for name in ("prediction", "label", "radius"))
    figures = certified_accuracy(*columns, result.decided_radii)
    for row, shown in zip(figures["certified_accuracy"], demo["certified_accuracy"], strict=True):
        assert {name: row[name] for name in ("radius", "right", "share", "interval_95")}.items() <= shown.items()
    assert figures["num_images"] == demo["num_records"]
    draws = result.column("num_samples")
    assert demo["mean_draws"] == sum(draws) / len(draws)


def test_the_shipped_results_meet_what_the_project_promises():
    demo = json.loads((SHIPPED_MODEL / "results" / "demo" / "demo.json").read_text())
    shares = {row["radius"]: row["share"] for row in demo["certified_accuracy"]}
    assert shares[0.25] >= 0.38
    assert (demo["settings"]["sigmas"], demo["settings"]["alpha"]) == ([0.25], 0.001)


def test_a_diffusion_model_is_worth_20_points_to_a_classifier_of_clean_images():
    study = json.loads((ROOT / "scripts" / "studies" / "results" / "denoisers" / "study.json").read_text())
    rows = {row["denoiser_kind"]: row for row in study["results"]}
    shares = {
        kind: {share["radius"]: share["share"] for share in row["certified_accuracy"]} for kind, row in rows.items()
    }
    assert {(row["sigma"], row["alpha"], row["num_images"]) for row in rows.values()} == {(0.25, 0.001, 200)}
    assert shares["diffusion"][0.25] - shares["none"][0.25] >= 0.2
    assert shares["diffusion"][0.25] > shares["wiener"][0.25]
