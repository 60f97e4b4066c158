"""What a new user stumbles on at the command line: wrong settings, several values, help, and what tables say."""

import os
import re

import pytest
import torch
from helpers.finished_runs import write_run
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from hf_smoothing import FixedRule, GaussianNoise, SequentialRule, SmoothedClassifier, TwoStageRule
from hf_smoothing.cli.app import app
from hf_smoothing.runs.time_estimate import announce_time, describe_time, format_seconds

COMMANDS = get_command(app).commands


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sigma", "0"], "--sigma=0.0 must be"),
        (["--radius", "0.7", "--max-draws", "50"], "--max-draws=50 draws can never certify radius 0.7"),
        (["--method", "surely"], "--method='surely' is unknown"),
        (["--denoiser", "gauss"], "--denoiser='gauss' is unknown"),
        (["--noise-resolution", "huge"], "--noise-resolution='huge' must be"),
        (["--method", "surrogate"], "takes a count head: pass --count-head"),
        (["--seed", "-1"], "--seed=-1 must be"),
    ],
)
def test_settings_are_checked_before_the_model_is_loaded(picture, arguments, said):
    done = run("certify", picture, "--model", "no/such-model", *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert "no/such-model" not in done.stderr


def test_pictures_are_read_before_the_model_is_loaded():
    assert "no image at 'gone.png'" in run("certify", "gone.png", "--model", "no/such-model").stderr


def test_errors_of_a_run_name_its_options(tmp_path, parquet, model):
    done = run(
        "certify-dataset", "--model", model, "--dataset", parquet, "--sigma", 0.25, "--output-dir", tmp_path / "run",
        "--count-head", model, "--method", "fixed",
    )  # fmt: skip
    assert done.exit_code == 2
    assert f"--count-head='{model}' has no meaning" in " ".join(done.stderr.split())


@pytest.mark.parametrize("flag", ["--radii 0 0.25", "--radii 0 --radii 0.25", "--radii=0 --radii 0.25"])
def test_options_take_several_values_at_once(tmp_path, flag):
    write_run(tmp_path / "one")
    done = run("report", tmp_path / "one", *flag.split(), "--output-dir", tmp_path / "report")
    assert done.exit_code == 0, done.output
    assert "r = 0.25" in done.output
    assert "r = 0.5" not in done.output


def test_an_option_without_its_value_is_an_error(tmp_path):
    for words in (["--radii"], ["--radii", "--envelope"]):
        done = run("report", tmp_path, *words)
        assert done.exit_code == 2
        assert "--radii" in done.stderr


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_names_options_and_their_defaults_in_full(name):
    shown = run(name, "--help", env={"COLUMNS": "80"}).output
    assert "…" not in shown
    for option in COMMANDS[name].params:
        flag = max(option.opts, key=len)
        assert flag in shown
        if flag.startswith("--") and not option.is_flag:
            text = re.split(rf"^  {flag}\b", shown, flags=re.MULTILINE)[1]
            text = " ".join(re.split(r"^  --", text, flags=re.MULTILINE)[0].split())
            assert re.search(r"default|without (it|them)\b|\[required\]", text, re.IGNORECASE), text


def test_counts_show_classes_and_no_radius(picture, tiny_model_dir):
    done = run("certify", picture, "--model", tiny_model_dir, "--method", "counts", "--max-draws", 20)
    assert done.exit_code == 0, done.output
    assert "20 noisy copies; counts prove no radius" in " ".join(done.output.split())
    assert "0.000" not in done.output


def test_tables_count_passes_that_include_the_clean_one(picture, tiny_model_dir):
    done = run("certify", picture, "--model", tiny_model_dir, "--radius", 0.3, "--max-draws", 200)
    assert "passes" in done.output
    assert "draws" not in done.output


def test_certify_says_which_classes_the_model_knows(picture, tiny_model_dir):
    done = run("certify", picture, "--model", tiny_model_dir, "--max-draws", 50)
    assert "The model knows 3 classes: cat, dog, frog." in done.output
    assert "A certificate does not say that its answer is right." in done.output


def test_nothing_says_that_weights_are_loading(processes, picture, tiny_model_dir):
    done = processes.run("hf-smoothing", "certify", picture, "--model", tiny_model_dir, "--max-draws", 50)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (FixedRule(), "This takes about 3 minutes: 100,100 draws for 1 image, 500 draws per second."),
        (TwoStageRule(draws=600), None),
        (
            TwoStageRule(draws=20_000),
            "This takes about 40 seconds on average: 20,000 draws per image (an easy one takes more, at most 100,000; ",
        ),
        (
            TwoStageRule(draws=20_000, max_draws=15_000),
            "This takes about 30 seconds on average: 15,000 draws per image",
        ),
        (SequentialRule((0.1,), max_draws=20_000), "This takes at most about 40 seconds: at most 20,000 draws"),
    ],
)
def test_long_work_says_how_long_before_it_starts(rule, said):
    notice = describe_time(rule, 0.002, images=1)
    assert notice is None if said is None else notice.startswith(said)
    assert describe_time(rule, 1e-9, images=1) is None


def test_the_time_of_two_levels_may_be_twice_that_of_one(capsys):
    smoothed = SmoothedClassifier(lambda pixels: pixels.mean((2, 3)), GaussianNoise(0.5))
    rule, pixels = FixedRule(n=10**12), torch.rand(3, 8, 8)
    assert announce_time(rule, smoothed, pixels, images=1)
    assert "at both levels" not in capsys.readouterr().err
    assert announce_time(rule, smoothed.with_fallback(), pixels, images=1)
    assert "need draws at both levels, up to about twice as many" in capsys.readouterr().err


def test_times_are_rounded():
    times = [format_seconds(seconds) for seconds in (42, 180, 9000, 400_000)]
    assert times == ["42 seconds", "3 minutes", "2.5 hours", "4.6 days"]


def test_certify_fixed_says_how_long_it_takes(picture, tiny_model_dir, processes):
    process = processes.start(
        "hf-smoothing", "certify", picture, "--model", tiny_model_dir, "--method", "fixed", "--max-draws", 5_000_000
    )
    shown = b""
    while b"draws per second" not in shown and process.poll(0.2) is None:
        shown = os.pread(process._output[1].fileno(), 10_000, 0)
    assert b"5,000,000 draws for 1 image" in shown
    assert process.poll() is None
    process.kill()
    assert process.poll(30) is not None


def test_a_device_can_be_chosen(picture, tiny_model_dir):
    done = run("certify", picture, "--model", tiny_model_dir, "--max-draws", 50, "--device", "meta")
    assert done.exit_code != 0  # there is nothing to compute with
    assert run("certify", picture, "--model", tiny_model_dir, "--max-draws", 50, "--device", "cpu").exit_code == 0
