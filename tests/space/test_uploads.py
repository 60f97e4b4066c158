"""What visitors drop is read within limits, and what is wrong with it is said without the server's paths."""

import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_smoothing.space import uploads
from hf_smoothing.space.uploads import read_dropped_runs, read_picture


@pytest.fixture(scope="module")
def frog(demo_images):
    return demo_images[6]["image"]


@pytest.mark.parametrize("name", ["frog.png", "frog.jpg", "frog.webp", "frog.bmp"])
def test_pictures_of_the_usual_formats_are_read(name, frog, tmp_path):
    frog.save(tmp_path / name)
    picture = read_picture(tmp_path / name)
    assert picture.mode == "RGB"
    assert picture.size == (32, 32)


def write_png(path, width, height):
    """A PNG whose header promises this size, with hardly any content."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize("side", [5000, 12_000, 60_000])
def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(side, tmp_path):
    write_png(tmp_path / "bomb.png", side, side)
    with pytest.raises(ValueError, match=r"bomb\.png (has|cannot)") as error:
        read_picture(tmp_path / "bomb.png")
    assert "truncated" not in str(error.value)  # which is what decoding would say


@pytest.mark.parametrize(
    "content", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"GIF89a" + b"\0" * 50]
)
def test_what_is_no_picture_is_refused_without_the_path(content, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png is no picture: use a PNG") as error:
        read_picture(tmp_path / "x.png")
    assert str(tmp_path) not in str(error.value)


def test_a_truncated_picture_is_refused(frog, tmp_path):
    frog.save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"x\.png cannot be read"):
        read_picture(tmp_path / "x.png")


def test_a_large_file_is_refused(monkeypatch, frog, tmp_path):
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 1000)
    frog.save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="larger than"):
        read_picture(tmp_path / "x.png")
    with pytest.raises(ValueError, match="larger than"):
        read_dropped_runs([tmp_path / "x.png"])


ROW = {"index": 0, "label": 1, "prediction": 1, "radius": 0.5, "guarantee": "per_input", "alpha": 0.001, "sigma": 0.25}
ROW |= {"norm": "l2", "seed": 42}


def write_run(folder, rows, settings=None):
    """A table and its `run.json`, each in a folder of its own, as uploads lie."""
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    table, run = folder / "a" / "certificates.parquet", folder / "b" / "run.json"
    pq.write_table(pa.Table.from_pylist(rows), table)
    run.write_text(json.dumps({"settings": {"seed": 42, "model_name_or_path": "user/frogs", **(settings or {})}}))
    return table, run


def test_a_table_and_its_run_are_read_whichever_comes_first(tmp_path):
    rows = [{**ROW, "index": index} for index in range(3)]
    table, run = write_run(tmp_path, rows, {"radii": [0.5], "method": "sequential"})
    for files in ([table, run], [run, table]):
        (result,) = read_dropped_runs(files)
        assert result.title == "frogs, sigma = 0.25"
        assert result.decided_radii == [0.5]
        assert [row["radius"] for row in result.rows] == [0.5] * 3


def test_several_runs_keep_their_own_settings(tmp_path):
    first = write_run(tmp_path / "1", [ROW])
    other_rows = [{**ROW, "seed": 7}, {**ROW, "seed": 7, "sigma": 0.5}]
    second = write_run(tmp_path / "2", other_rows, {"seed": 7, "model_name_or_path": "dogs"})
    results = read_dropped_runs([*first, *second])
    assert [result.title for result in results] == [
        "1: frogs, sigma = 0.25",
        "2: dogs, sigma = 0.25",
        "2: dogs, sigma = 0.5",
    ]


def test_files_that_make_no_run_are_refused(tmp_path):
    table, run = write_run(tmp_path, [ROW], {"seed": 1})
    (tmp_path / "x.csv").write_text("1,2")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    (tmp_path / "no.parquet").write_text("no table")
    for files, message in (
        ([table, run], "run.json belongs to none of the tables"),
        ([run], "There is no table"),
        ([tmp_path / "x.csv"], "x.csv is neither a table"),
        ([table, tmp_path / "list.json"], "list.json is no run.json"),
        ([table, tmp_path / "deep.json"], "deep.json is no run.json"),
        ([tmp_path / "x.parquet"], "x.parquet is no table of certificates: it lacks the columns"),
        ([tmp_path / "no.parquet"], "no.parquet is no table of certificates"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read_dropped_runs(files)
        assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("store_schema", [False, True])
def test_a_table_that_grows_far_beyond_its_file_is_refused(store_schema, monkeypatch, tmp_path):
    """A dictionary holds one long text, and 100,000 rows name it: 100 GB from a small file."""
    monkeypatch.setattr(uploads, "_MEMORY", 2**29)
    rows = 100_000
    columns = {name: pa.array(np.arange(rows)) for name in ("index", "label", "prediction")}
    columns["radius"] = pa.array(np.zeros(rows))
    long_texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 2**20]))
    columns["norm"] = long_texts
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table(columns), path, use_dictionary=["norm"], compression="zstd", store_schema=store_schema)
    assert path.stat().st_size < 2**21
    with pytest.raises(ValueError, match=r"bomb\.parquet is no table of certificates: .*(too large|malloc|allocate)"):
        read_dropped_runs([path])


def test_a_table_that_takes_too_long_is_refused(monkeypatch, tmp_path):
    table, _ = write_run(tmp_path, [ROW])
    monkeypatch.setattr(uploads, "_SECONDS", 0)
    with pytest.raises(ValueError, match="takes longer than 0 s"):
        read_dropped_runs([table])


def test_too_many_rows_are_refused(tmp_path):
    table, _ = write_run(tmp_path, [ROW])
    columns = {name: pa.array(np.arange(uploads.MAX_ROWS + 1)) for name in ("index", "label", "prediction")}
    pq.write_table(pa.table({**columns, "radius": columns["index"]}), table)
    with pytest.raises(ValueError, match="more than 200,000 rows"):
        read_dropped_runs([table])
