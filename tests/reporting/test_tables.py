import io

import pytest
from rich.console import Console

from hf_smoothing.reporting.tables import print_table

ROWS = [
    {"run": run, "sigma": sigma}
    | {f"r = {number}": f"{10 * number}.0%\n{9 * number}.1-{11 * number}.2" for number in range(1, 8)}
    for run, sigma in (("run_torn/nano", "0.25"), ("best of several sigmas of one model", ""))
]


def printed(rows, width, keys=2):
    out = io.StringIO()
    print_table(Console(file=out, width=width), "title", rows, keys)
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_cells_stay_whole_on_a_narrow_terminal(width):
    text = printed(ROWS, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("title") == 1
    for number in range(1, 8):
        assert text.count(f"r = {number}") == 1
        assert text.count(f" {9 * number}.1-{11 * number}.2 ") == 2
    assert text.count("run_torn/nano") == text.count("┃ run ")  # each table says what its rows are


def test_one_table_where_there_is_room():
    text = printed(ROWS, 200)
    assert text.count("run_torn/nano") == 1
    assert "best of several sigmas of one model" in text


def test_a_very_long_name_is_broken_rather_than_the_figures():
    text = printed(
        [{"image": "x" * 200, "prediction": "dog", "radius": "0.123", "guarantee": "per_input"}], 80, keys=1
    )
    assert text.count("x") == 200
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("dog", "0.123", "per_input"):
        assert text.count(whole) == 1
