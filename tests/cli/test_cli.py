import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.finished_runs import write_log, write_run
from helpers.paths import ROOT, SHIPPED_MODEL
from PIL import Image
from typer.testing import CliRunner

from hf_smoothing.cli.app import app
from hf_smoothing.reporting.results import read_results


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / name)
    return [tmp_path / "red.png", tmp_path / "blue.png"]


def test_certify_prints_a_table(pictures, tiny_model_dir):
    done = run("certify", *pictures, "--model", tiny_model_dir, "--max-draws", 50)
    assert done.exit_code == 0, done.output
    for word in ("How far does the prediction hold?", "prediction", "radius", "per_input", "0.25"):
        assert word in done.output
    decided = run("certify", *pictures, "--model", tiny_model_dir, "--radius", 0.1, "--max-draws", 200)
    assert "Does the prediction hold to radius 0.1?" in decided.output


def test_certify_prints_json(pictures, tiny_model_dir):
    done = run(
        "certify", *pictures, "--model", tiny_model_dir, "--sigma", 0.5, "--sigma", 1, "--alpha", 0.01, "--radius", 0.1,
        "--max-draws", 200, "--seed", 5, "--json",
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(Path(line["image"]).name, line["sigma"]) for line in lines] == [
        ("red.png", 0.5), ("blue.png", 0.5), ("red.png", 1.0), ("blue.png", 1.0),
    ]  # fmt: skip
    assert {(line["alpha"], line["seed"], line["method"]) for line in lines} == {(0.01, 5, "sequential")}


def test_certify_at_two_levels_together(pictures, tiny_model_dir):
    arguments = ("certify", *pictures, "--model", tiny_model_dir, "--sigma", "auto", "--max-draws", 60)
    done = run(*arguments, "--levels", 0.25, 0.1, "--agreement", 0.6, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(line["level_choice"]["levels"], line["level_choice"]["agreement"]) for line in lines] == [
        ([0.25, 0.1], 0.6)
    ] * 2
    table = run(*arguments)
    assert "(auto)" in table.output, table.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.png"], "There is no image at 'gone.png'"),
        (["--sigma", "0"], "sigma=0.0 must be"),
        (["--alpha", "2"], "alpha=2.0"),
        (["--radius", "0.7", "--max-draws", "50"], "at least"),
        (["--method", "surely"], "method='surely'"),
        (["--agreement", "0.6"], "agreement=0.6 has no meaning without --sigma='auto'"),
        (["--sigma", "auto", "--levels", "0.5"], "must be two noise levels"),
    ],
)
def test_errors_are_one_clear_line_and_an_exit_code(pictures, tiny_model_dir, arguments, said):
    done = run("certify", *pictures, "--model", tiny_model_dir, *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.output


def test_names_are_not_read_as_markup(tmp_path, tiny_model_dir):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat[bold].png")
    done = run("certify", tmp_path / "cat[bold].png", "--model", tiny_model_dir, "--max-draws", 50)
    assert "cat[bold].png" in "".join(done.output.replace("│", "").split())
    assert "gone[x].png" in run("certify", "gone[x].png", "--model", tiny_model_dir).stderr


def test_a_model_that_is_not_there(pictures):
    done = run("certify", *pictures, "--model", "no/such-model")
    assert done.exit_code == 2
    assert "no/such-model" in done.stderr


def test_demo_on_the_images_that_ship(tiny_model_dir, tmp_path):
    done = run("demo", "--model", tiny_model_dir, "--output-dir", tmp_path, "--max-draws", 400)
    # three classes for ten: the demo says so instead of certifying nonsense
    assert done.exit_code == 2
    assert "classes" in done.stderr


def test_the_demo_leaves_out_a_head_that_does_not_know_its_noise_level(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model-counts").mkdir()
    config = json.loads((Path(tiny_model_dir) / "config.json").read_text())
    (tmp_path / "model-counts" / "config.json").write_text(json.dumps({**config, "count_sigmas": [0.5, 1.0]}))
    without = run("demo", "--model", tmp_path / "model", "--output-dir", tmp_path, "--sigma", 0.25)
    assert "knows noise levels from 0.5 to 1: certifying without it" in " ".join(without.stdout.split())
    assert "classes" in without.stderr
    taken = run("demo", "--model", tmp_path / "model", "--output-dir", tmp_path, "--sigma", 0.5)
    assert "model-counts" in taken.stderr  # which holds no weights


def test_the_demo_is_a_dataset_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    demo = ("demo", "--model", model, "--output-dir", tmp_path, "--max-draws", 60, "--sigma", 0.5)
    done = run(*demo, "--seed", 0)
    assert done.exit_code == 0, done.stderr
    for word in ("label", "prediction", "radius", "passes", "guarantee", "per_input", "r = 0.25", "certificates.png"):
        assert word in done.stdout
    assert Image.open(tmp_path / "certificates.png").width > 1000
    results = json.loads((tmp_path / "demo.json").read_text())
    assert results["versions"]["torch"]
    assert results["settings"]["dataset_name"] == "hf_smoothing/data/cifar10_demo.parquet"
    assert [row["radius"] for row in results["certified_accuracy"]] == [0, 0.25, 0.5]
    assert results["seconds"] > 0
    (result,) = read_results([tmp_path])
    assert result.decided_radii == [0, 0.25, 0.5]
    assert len(result.rows) == 200
    # other settings do not overwrite the certificates
    refused = run(*demo, "--seed", 1)
    assert (refused.exit_code, "seed: 0 -> 1" in refused.stderr) == (2, True)


def test_report_of_runs_and_a_log(tmp_path):
    runs = [write_run(tmp_path / "one", (0.25, 0.5)), write_run(tmp_path / "two", (0.5,), model="user/other")]
    log = write_log(tmp_path / "cohen.tsv")
    out = tmp_path / "report"
    done = run(
        "report",
        *runs,
        log,
        "--log-guarantee",
        "per_input",
        "--log-alpha",
        0.001,
        "--radii",
        0,
        "--radii",
        0.25,
        "--output-dir",
        out,
    )
    assert done.exit_code == 0, done.output
    for word in ("one", "two", "cohen.tsv", "r = 0.25", "unknown", "2410.06895", "report.md"):
        assert word in done.output
    assert "best of" not in done.output
    report = json.loads((out / "report.json").read_text())
    assert [entry["title"] for entry in report["results"]] == [
        "one, sigma = 0.25", "one, sigma = 0.5", "two, sigma = 0.5", "cohen.tsv",
    ]  # fmt: skip
    text = (out / "report.md").read_text()
    assert text.count("Median number of counted draws per image: one, sigma = 0.25: 200; ") == 1
    for picture in ("certified-accuracy", "p-a", "draws"):
        assert f"({picture}.png)" in text
        assert Image.open(out / f"{picture}.png").width > 500
        assert (out / f"{picture}.svg").stat().st_size > 1000


def test_report_goes_into_the_folder_of_a_single_run(tmp_path):
    folder = write_run(tmp_path / "one", (0.25, 0.5))
    done = run("report", folder, "--envelope")
    assert done.exit_code == 0, done.output
    assert "best of several sigmas of one model" in (folder / "report.md").read_text()


def test_report_shows_pictures(tmp_path):
    images = ROOT / "hf_smoothing" / "data" / "cifar10_demo.parquet"
    done = run("report", SHIPPED_MODEL / "results" / "demo", "--output-dir", tmp_path, "--images", images)
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "examples-0.png").width > 500
    assert "(examples-0.png)" in (tmp_path / "report.md").read_text()


def test_report_of_a_run_all_of_whose_images_failed(tmp_path):
    folder = write_run(tmp_path / "one", images=60)
    rows = [row for row in pq.read_table(folder / "certificates.parquet").to_pylist() if row["error"]]
    pq.write_table(pa.Table.from_pylist([row | {"index": 0} for row in rows]), folder / "certificates.parquet")
    images = ROOT / "hf_smoothing" / "data" / "cifar10_demo.parquet"
    done = run("report", folder, "--images", images)
    assert done.exit_code == 0, done.output
    assert (folder / "report.md").read_text().startswith("# Certified accuracy (every image failed)\n")
    assert "guarantee unknown" not in done.output
    assert not list(folder.glob("examples*"))
    # beside one that certified some, it is what that is
    beside = run("report", folder, write_run(tmp_path / "two"), "--output-dir", tmp_path / "report")
    assert beside.exit_code == 0, beside.output
    assert "Guarantee: per_input" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone"], "'gone' does not exist"),
        (["none"], "do not make one figure"),
        (["--envelope"], "two results or more"),
        (["--radii", "-1"], "thresholds=[-1.0]"),
        (["--images", "no/such-dataset"], "no/such-dataset"),
    ],
)
def test_reports_that_cannot_be(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "one")
    write_run(tmp_path / "none", guarantee="none")
    done = run("report", "one", *arguments)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
    assert not Path("one/report.md").exists()


def test_help_teaches():
    assert "certify" in run("--help").output
    assert "radius" in run("certify", "--help").output
    assert SHIPPED_MODEL.name in run("demo", "--help").output.replace("\n", "").replace("│", "").replace(" ", "")
