"""What results say of where they come from."""

import sys

import pytest

from hf_smoothing.utils.provenance import command_line


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        ("/data/my-model", "my-model"),
        ("~/runs/low", "low"),
        ("/data/runs/", "runs/"),
        ("--output_dir=/data/out", "--output_dir=out"),
        ("ours=/data/ours.parquet", "ours=ours.parquet"),
        ("/data/a,/data/b=/data/c", "a,b=c"),
        ("all=all.parquet=runs/low,runs/high", "all=all.parquet=runs/low,runs/high"),
        ("https://example.org/frog.png", "https://example.org/frog.png"),
        ("user/my-model", "user/my-model"),
    ],
)
def test_a_recorded_command_names_no_folder_of_the_machine(monkeypatch, typed, recorded):
    monkeypatch.setattr(sys, "argv", ["/clone/scripts/studies/study.py", typed])
    assert command_line() == f"scripts/studies/study.py {recorded}"
