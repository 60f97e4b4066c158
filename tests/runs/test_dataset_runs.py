import json
import os

import datasets
import pyarrow.parquet as pq
import pytest
from helpers.finished_runs import rows
from helpers.models import NAMES, save_model
from PIL import Image
from transformers import ViTImageProcessor, pipeline
from typer.testing import CliRunner

from hf_smoothing import MixedNoiseViTForImageClassification
from hf_smoothing.cli.app import app
from hf_smoothing.runs import records as records_module
from hf_smoothing.runs.records import SCHEMA


def test_records_and_run_json(certify, parquet, model, tmp_path):
    summary = certify(sigmas=(0.5, 0.25), every=20, radii=(0.1, 0.2))
    records = rows(tmp_path / "run")
    assert (summary.num_records, summary.num_new, summary.errors) == (20, 20, ())
    assert [(row["sigma"], row["index"]) for row in records] == [
        (sigma, index) for sigma in (0.25, 0.5) for index in range(0, 200, 20)
    ]
    data = datasets.Dataset.from_parquet(parquet)
    for row in records:
        assert row["label_name"] == NAMES[row["label"]]
        assert row["label_name"].lower() == data.features["label"].int2str(data[row["index"]]["label"])
        assert row["prediction_name"] == (None if row["prediction"] == -1 else NAMES[row["prediction"]])
        assert sum(row["counts"]) + 1 == row["num_samples"]
        assert (row["guarantee"], row["method"], row["dtype"], row["error"]) == (
            "per_input", "sequential", "float32", None,
        )  # fmt: skip
    assert len({row["prediction"] for row in records}) > 2
    assert len({row["radius"] for row in records}) > 2
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "run" / "certificates.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert loaded.column_names == SCHEMA.names
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["image_column"] == "image"
    assert run["settings"]["image_processor.backend"] == "torchvision"
    assert run["settings"]["label_names"] == NAMES
    assert run["settings"]["model_name_or_path"] == model
    assert run["versions"]["torch"]
    assert run["command"]
    assert run["finished"]
    lines = [json.loads(line) for line in (tmp_path / "run/shards/records-rank00000.jsonl").read_text().splitlines()]
    assert (
        sorted(({**line, "seconds": None} for line in lines), key=lambda row: (row["sigma"], row["index"])) == records
    )


def test_the_same_certificates_as_the_pipeline(certify, model, demo_images, tmp_path):
    certify(every=10, seed=3, radii=(0.1, 0.2))
    pipe = pipeline("certified-image-classification", model=model, sigma=0.25, max_draws=60)
    expected = pipe(list(demo_images[::10]["image"]), seed=3, radii=(0.1, 0.2))
    records = rows(tmp_path / "run")
    assert len(records) == len(expected) == 20
    for row, result in zip(records, expected):
        assert result.pop("label") == row["prediction_name"]
        assert {name: row[name] for name in result} == result


def test_a_stream_gives_what_a_stored_dataset_gives(certify, tmp_path):
    certify(tmp_path / "stored", every=17, sigmas=(0.25, 0.5))
    certify(tmp_path / "streamed", every=17, sigmas=(0.25, 0.5), streaming=True, batch_size=17)
    assert rows(tmp_path / "stored") == rows(tmp_path / "streamed")
    assert len(rows(tmp_path / "stored")) == 24
    # and a stream resumes the run of a stored dataset
    assert certify(tmp_path / "stored", every=17, sigmas=(0.25, 0.5), streaming=True).num_new == 0


def test_fewer_images_are_spread_over_the_split(certify, tmp_path):
    """Many splits are sorted by class: their first images would all be of one."""
    certify(tmp_path / "stored", max_samples=12)
    indices = [row["index"] for row in rows(tmp_path / "stored")]
    assert (len(indices), indices) == (12, sorted(indices))
    assert {index // 50 for index in indices} == {0, 1, 2, 3}
    certify(tmp_path / "again", max_samples=12, seed=1)
    assert [row["index"] for row in rows(tmp_path / "again")] == indices
    run = json.loads((tmp_path / "stored" / "run.json").read_text())
    assert run["settings"]["max_samples_at_random"]
    # a stream has no known end, so its first images are other ones
    with pytest.raises(ValueError, match="max_samples_at_random: True -> False"):
        certify(tmp_path / "stored", max_samples=12, streaming=True)
    certify(tmp_path / "streamed", max_samples=12, streaming=True)
    assert [row["index"] for row in rows(tmp_path / "streamed")] == list(range(12))


def test_a_folder_of_pictures(certify, demo_images, tmp_path):
    for index in range(0, 200, 25):
        row = demo_images[index]
        path = tmp_path / "pictures" / demo_images.features["label"].int2str(row["label"]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    for streaming in (False, True):
        folder = tmp_path / f"run {streaming}"
        certify(folder, dataset_name=str(tmp_path / "pictures"), split="train", streaming=streaming)
        records = rows(folder)
        assert len(records) == 8
        assert all(row["error"] is None for row in records)
        assert [row["label_name"].lower() for row in records] == sorted(row["label_name"].lower() for row in records)


def test_larger_radii_are_for_larger_sigmas(certify, tmp_path):
    certify(sigmas=(0.1, 1.0), radii=(0.1, 1.0), every=50, max_draws=100)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["radii_decided"] == {"0.1": [0.1], "1": [0.1, 1.0]}
    with pytest.raises(ValueError, match="radius=9 can never be certified"):
        certify(sigmas=(0.1, 1.0), radii=(0.1, 9), max_draws=100)


def test_broken_images_are_recorded_and_reported(certify, demo_images, tmp_path):
    pictures = datasets.Dataset.from_dict(
        {"image": [row["image"] for row in demo_images.select(range(6)).cast_column("image", datasets.Image(decode=False))],
         "label": demo_images[:6]["label"]},
        features=datasets.Features({"image": datasets.Image(decode=False), "label": demo_images.features["label"]}),
    )  # fmt: skip

    def spoil(row, index):
        if index == 0:
            row["image"] = {"bytes": b"no picture", "path": None}
        if index == 2:
            row["image"] = {"bytes": row["image"]["bytes"][:200], "path": "cut.png"}
        if index == 4:
            row["image"] = None
        return row

    spoilt = pictures.map(spoil, with_indices=True, cache_file_name=str(tmp_path / "cache.arrow"))
    spoilt.to_parquet(tmp_path / "spoilt.parquet")
    summary = certify(tmp_path / "spoilt", dataset_name=str(tmp_path / "spoilt.parquet"), max_draws=60)
    records = rows(tmp_path / "spoilt")
    assert [row["error"] is not None for row in records] == [True, False, True, False, True, False]
    for row in (records[0], records[2], records[4]):
        assert row["num_samples"] == 0
        assert row["prediction"] is row["radius"] is row["guarantee"] is row["counts"] is None
        assert (row["sigma"], row["alpha"], row["method"], row["dtype"]) == (0.25, 0.001, "two-stage", "float32")
        assert row["label_name"]
    assert "Not certified, and counted as wrong: 3 images (index 0, 2, 4)" in str(summary)
    assert "not a picture" in str(summary)
    # the others are as without them, and nothing is left to do
    certify(tmp_path / "sound", split="test[:6]")
    assert [row for row in rows(tmp_path / "sound") if row["index"] % 2] == [
        row for row in records if row["index"] % 2
    ]
    assert certify(tmp_path / "spoilt", dataset_name=str(tmp_path / "spoilt.parquet"), max_draws=60).num_new == 0


def test_a_file_that_is_away_stops_the_run_until_it_is_back(certify, demo_images, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(8)]
    for path, picture in zip(paths, demo_images[:8]["image"]):
        picture.save(path)
    files = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(path)} for path in paths], "label": demo_images[:8]["label"]},
        features=datasets.Features({"image": datasets.Image(decode=False), "label": demo_images.features["label"]}),
    )
    pq.write_table(files.data.table, tmp_path / "files.parquet")  # paths, not pictures
    (tmp_path / "away").mkdir()
    for path in (paths[0], paths[5]):
        away = path.rename(tmp_path / "away" / path.name)
        with pytest.raises(OSError, match=rf"file '.*{path.name}' of the dataset cannot be read: .*No such file"):
            certify(dataset_name=str(tmp_path / "files.parquet"), batch_size=8)
        away.rename(path)
    done = (tmp_path / "run" / "shards" / "records-rank00000.jsonl").read_bytes().count(b"\n")
    assert 4 <= done <= 5  # image 4 may be in progress when the engine reads image 5
    summary = certify(dataset_name=str(tmp_path / "files.parquet"), batch_size=8)
    assert (summary.num_records, summary.num_new, summary.errors) == (8, 8 - done, ())
    certify(tmp_path / "sound", split="test[:8]")
    assert rows(tmp_path / "run") == rows(tmp_path / "sound")


def test_images_of_another_shape(certify, model, tmp_path):
    folder = tmp_path / "as they are"
    MixedNoiseViTForImageClassification.from_pretrained(model).save_pretrained(folder)
    ViTImageProcessor(do_resize=False, do_normalize=False).save_pretrained(folder)
    for index, size in enumerate((8, 12, 8)):
        path = tmp_path / "pictures" / ("cat", "dog")[index // 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), "teal").save(path)
    certify(model_name_or_path=str(folder), dataset_name=str(tmp_path / "pictures"), split="train")
    errors = [row["error"] for row in rows(tmp_path / "run")]
    assert errors[0] is errors[2] is None
    assert errors[1] == "The image has shape (3, 12, 12) after the image processor, the first one (3, 8, 8)."


def test_a_full_disk_loses_nothing_already_written(certify, tmp_path, monkeypatch):
    certify(tmp_path / "uninterrupted", every=10)
    write, written = os.write, []

    def full(file, data):
        if len(data) > 300 and len(written) == 8:
            if data[:1] == b"{":
                return write(file, data[:100])
            raise OSError(28, "No space left on device")
        written.append(data)
        return write(file, data)

    monkeypatch.setattr(records_module.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        certify(every=10)
    monkeypatch.undo()
    shard = (tmp_path / "run" / "shards" / "records-rank00000.jsonl").read_bytes()
    assert shard.count(b"\n") == 8
    assert not shard.endswith(b"\n")
    assert certify(every=10).num_new == 12
    assert rows(tmp_path / "run") == rows(tmp_path / "uninterrupted")


def test_errors_before_any_work(certify, demo_images, tmp_path, monkeypatch):
    other = save_model(tmp_path / "other", ["cat", "dog"])
    forwards = []
    monkeypatch.setattr(MixedNoiseViTForImageClassification, "forward", lambda *args, **kwargs: forwards.append(args))
    for settings, message in (
        ({"image_column": "pic"}, "no column 'pic'; the dataset has: image, label"),
        ({"label_column": "coarse"}, "no column 'coarse'; the dataset has: image, label"),
        ({"sigmas": (0.0,)}, "sigma"),
        ({"sigmas": ()}, "sigma"),
        ({"sigmas": (0.25, 0.25)}, "sigma"),
        ({"every": 0}, "every=0"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"seed": 2**63}, f"seed={2**63} must be"),
        ({"max_draws": 0}, "max_draws=0 must be"),
        ({"radii": (0.9,)}, r"max_draws=60 draws can never certify radius 0\.9"),
        ({"revision": "v1"}, "revision='v1' is for models on the Hub"),
        (
            {"model_name_or_path": "no/such-model"},
            r"The model 'no/such-model' cannot be loaded\. There is no such folder",
        ),
        ({"dtype": "float16"}, "dtype='float16' is unknown"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"model_name_or_path": other}, r"\['airplane', .*the model has \['cat', 'dog'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            certify(**settings)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        certify(tmp_path / "file")
    demo_images.select([]).to_parquet(tmp_path / "empty.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"split 'test' of .* (is empty|.* no data)"):
            certify(dataset_name=str(tmp_path / "empty.parquet"), streaming=streaming)
    plain = demo_images.select(range(12)).cast_column("label", datasets.Value("int64"))
    plain = plain.map(lambda row, index: {"label": 10 if index == 7 else 0}, with_indices=True)
    plain.to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match="Image 7: label 10 is none of the model's 10 classes"):
        certify(dataset_name=str(tmp_path / "plain.parquet"))
    assert not forwards


def test_the_largest_seed_and_bfloat16_are_recorded(certify, tmp_path):
    certify(every=50, seed=2**63 - 1, dtype="bfloat16")
    assert {(row["seed"], row["dtype"]) for row in rows(tmp_path / "run")} == {(2**63 - 1, "bfloat16 autocast")}


def test_the_command(model, parquet, tmp_path):
    def run(*arguments):
        command = ["certify-dataset", "--model", model, "--dataset", parquet, "--output-dir", tmp_path / "run"]
        return CliRunner().invoke(app, [str(argument) for argument in (*command, *arguments)])

    ask = ("--sigma", 0.25, "--sigma", 0.5, "--every", 50, "--max-draws", 60, "--radii", 0.1)
    done = run(*ask, "--seed", 0)
    assert done.exit_code == 0, done.output
    assert "8 records in" in done.stdout
    assert "draws/s" in done.stderr or "8/8" in done.stderr
    assert "no column 'pic'; the dataset has: image, label. Choose one with --image_column." in " ".join(
        run(*ask, "--image_column", "pic").stderr.split()
    )
    refused = run(*ask, "--seed", 1)
    assert refused.exit_code == 2
    assert "seed: 0 -> 1" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.output
