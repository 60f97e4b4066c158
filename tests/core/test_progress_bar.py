"""The progress bar of a certification: what it shows of images that are finished, and of one in progress."""

import fcntl
import os
import struct
import sys
import termios
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from hf_smoothing import FixedRule, GaussianNoise, SmoothedClassifier, TwoStageRule
from hf_smoothing.cli.app import app
from hf_smoothing.core import progress_bar
from hf_smoothing.core.certificates import format_radius
from hf_smoothing.core.progress_bar import ProgressBar, open_bar

NOISE = GaussianNoise(0.25)


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes a terminal of standard error, sets its width, and returns what was shown since."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    file = os.fdopen(theirs, "w")

    def read(columns=100):
        monkeypatch.setattr(sys, "stderr", file)  # here: pytest changes it between a fixture and its test
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        shown = b""
        with suppress(BlockingIOError):
            while part := os.read(ours, 4096):  # a terminal hands over no more at a time
                shown += part
        return shown.decode()

    return read


@pytest.mark.parametrize("columns", [0, 100])
def test_a_terminal_shows_a_bar_even_if_it_does_not_know_its_width(terminal, columns):
    terminal(columns)
    for _ in open_bar(range(3), "counting"):
        pass
    shown = terminal()
    assert "counting: 100%" in shown
    assert shown.count("\n") == 1


def test_a_log_gets_lines_now_and_then(capfd, monkeypatch):
    for seconds, lines in ((0.0, 4), (1000.0, 1)):
        monkeypatch.setattr(progress_bar, "LINE_SECONDS", seconds)
        for _ in open_bar(range(4), "counting", miniters=1):
            time.sleep(0.01)
        shown = capfd.readouterr().err
        assert "\r" not in shown
        assert shown.count("\n") >= lines
        assert shown.splitlines()[-1].startswith("counting: 100%")
    assert shown.count("\n") == 1
    with open_bar(total=2, desc="counting") as bar:
        bar.write("a line", file=sys.stderr)
        bar.update(2)
        bar.refresh()
    assert capfd.readouterr().err.splitlines()[0] == "a line"
    with open_bar(range(4), leave=False) as bar:
        next(iter(bar))
    assert capfd.readouterr().err == ""


def test_a_single_image_shows_the_radius_so_far(terminal):
    def classify(pixels):
        time.sleep(0.02)  # so that the bar is due
        return torch.stack([pixels.mean((1, 2, 3)), torch.full((len(pixels),), 0.1)], 1)

    terminal()
    smoothed = SmoothedClassifier(classify, NOISE, batch_size=32)
    (certificate,) = smoothed.certify(torch.full((1, 3, 4, 4), 0.8), "fixed", n=500, progress=True, seed=0)
    shown = terminal().split("\r")
    so_far = [float(text.split("so far ")[1].split()[0]) for text in shown if "radius so far" in text]
    assert so_far == sorted(so_far)  # all draws hit, so each batch proves more
    assert 0 < so_far[0] < certificate.radius
    assert shown[-2].rstrip().endswith(f", radius {format_radius(certificate.radius)}")


def test_finished_images_show_their_mean_radius(capfd):
    bar = ProgressBar(4)
    bar.finish([100, 300], [0.2, 0.4])
    bar.show(draws=50, done=0.5)
    assert bar.bar.n == 2.5
    bar.close()
    shown = capfd.readouterr().err
    assert "2 images" in shown
    assert "mean radius 0.30" in shown
    assert "so far" not in shown


@pytest.mark.parametrize("rule", [FixedRule(n0=10, n=50), TwoStageRule(draws=100, max_draws=400)])
def test_a_preview_is_what_the_draws_would_prove(rule):
    runs, row = rule.start(NOISE, 1, 3), np.array([0])
    wanted = runs.start(row, None)
    while not runs.counts.any():
        preview = runs.outcomes(row, np.array([[int(wanted[0]), 0, 0]]))
        before = runs.outcomes(row).radii
        wanted = runs.update(row, np.array([[int(wanted[0]), 0, 0]]))
    assert before == 0
    assert wanted == 0
    assert preview.radii == runs.outcomes(row).radii > 0


def test_the_command_certify_shows_progress_on_a_terminal(terminal, tiny_model_dir, tmp_path):
    for name in ("one", "two"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    pictures = [str(tmp_path / f"{name}.png") for name in ("one", "two")]
    terminal()
    app(["certify", *pictures, "--model", str(tiny_model_dir), "--max-draws", "50"], standalone_mode=False)
    shown = terminal()
    assert "certifying 100%" in shown
    assert "2 images" in shown
