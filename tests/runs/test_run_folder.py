"""Resuming a run, or refusing to."""

import json
import os

import pytest
from helpers.finished_runs import rows
from helpers.models import NAMES, save_model

from hf_smoothing import MixedNoiseViTForImageClassification
from hf_smoothing.runs.run_folder import RunFolder


def test_a_run_resumes_where_it_stopped(certify, tmp_path):
    certify(tmp_path / "uninterrupted", sigmas=(0.25, 0.5), every=10)
    certify(tmp_path / "cut", sigmas=(0.25, 0.5), every=10)
    shard = tmp_path / "cut" / "shards" / "records-rank00000.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / "shards" / "records-rank00003.jsonl").write_bytes(b"".join(lines[20:27]))
    shard.write_bytes(b"".join(lines[:9]) + lines[9][:50])  # torn
    (tmp_path / "cut" / "certificates.parquet").unlink()
    summary = certify(tmp_path / "cut", sigmas=(0.25, 0.5), every=10, batch_size=7)
    assert (summary.num_records, summary.num_new) == (40, 24)
    assert rows(tmp_path / "cut") == rows(tmp_path / "uninterrupted")
    assert len(json.loads((tmp_path / "cut" / "run.json").read_text())["sessions"]) == 2
    (tmp_path / "cut" / "certificates.parquet").unlink()
    summary = certify(tmp_path / "cut", sigmas=(0.25, 0.5), every=10)
    assert "finished already" in str(summary)
    assert rows(tmp_path / "cut") == rows(tmp_path / "uninterrupted")


def test_a_run_chooses_a_seed_and_resumes_with_it(certify, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for folder in runs:
        certify(folder, every=20, seed=None)
    seed, other_seed = (json.loads((folder / "run.json").read_text())["settings"]["seed"] for folder in runs)
    assert seed != other_seed
    records = rows(runs[0])
    assert {row["seed"] for row in records} == {seed}
    certify(tmp_path / "same", every=20, seed=seed)
    assert rows(tmp_path / "same") == records
    shard = runs[0] / "shards" / "records-rank00000.jsonl"
    shard.write_bytes(b"".join(shard.read_bytes().splitlines(keepends=True)[:4]))
    (runs[0] / "certificates.parquet").unlink()
    with pytest.raises(ValueError, match=f"other settings \\(seed: {seed} -> 5\\)"):
        certify(runs[0], every=20, seed=5)
    assert certify(runs[0], every=20, seed=None).num_new == 6
    assert rows(runs[0]) == records


def test_other_settings_are_refused_with_the_difference(certify, tmp_path, model, demo_images):
    certify(every=50)
    before = rows(tmp_path / "run")
    with pytest.raises(ValueError, match=r"alpha: 0\.001 -> 0\.01; seed: 0 -> 4"):
        certify(every=50, alpha=0.01, seed=4)
    with pytest.raises(ValueError, match=r"every: 50 -> 25"):
        certify(every=25)
    with pytest.raises(ValueError, match="holds a run: choose another folder"):
        certify(every=50, resume=False)
    other = save_model(tmp_path / "other", NAMES[::-1])
    with pytest.raises(ValueError, match=r"model_name_or_path: .*label_names: "):
        certify(every=50, model_name_or_path=other)
    assert rows(tmp_path / "run") == before
    assert certify(every=50, batch_size=3).num_new == 0
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"there is no .*run\.json"):
        certify(every=50)


def test_where_records_came_from_outlives_later_starts(certify, tmp_path, monkeypatch):
    def run(argv, **settings):
        monkeypatch.setattr("sys.argv", argv)
        certify(every=20, **settings)
        return json.loads((tmp_path / "run" / "run.json").read_text())

    first = run(["scripts/certify.py", "--every", "20"])
    torch_version = first["versions"]["torch"]
    assert first["command"] == "scripts/certify.py --every 20"
    first["versions"]["torch"] = first["sessions"][0]["versions"]["torch"] = "1.0"
    (tmp_path / "run" / "run.json").write_text(json.dumps(first))
    idle = run([str(tmp_path / "bin" / "hf-smoothing"), "certify-dataset"])
    assert [session["command"] for session in idle["sessions"]] == [first["command"], "hf-smoothing certify-dataset"]
    assert [session["num_new"] for session in idle["sessions"]] == [10, 0]
    assert (idle["command"], idle["versions"]) == (first["command"], first["versions"])
    shard = tmp_path / "run" / "shards" / "records-rank00000.jsonl"
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[:4]))
    last = run(["again.py"])
    assert [session["num_new"] for session in last["sessions"]] == [10, 0, 6]
    assert last["command"] == first["command"]
    assert last["versions"] == {**first["versions"], "torch": f"1.0 and {torch_version}"}


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"settings": {}}', '{"settings": {"al'])
def test_a_damaged_run_json_is_named(certify, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged, .* restore it from a copy"):
        certify(model_name_or_path="no/such-model")  # before it is loaded


def test_a_folder_that_cannot_be_written_to_is_found_before_any_work(certify, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"output_dir='.*file/run' cannot be written to: Not a directory"):
        certify(tmp_path / "file" / "run", model_name_or_path="no/such-model")
    with pytest.raises(ValueError, match="no/such-model"):
        certify(tmp_path / "new", model_name_or_path="no/such-model")
    assert not (tmp_path / "new").exists()


def test_the_error_mentions_files_that_were_touched(certify, demo_images, tmp_path):
    for index, name in ((0, "cat"), (1, "dog")):
        path = tmp_path / "pictures" / name / f"{index}.png"
        path.parent.mkdir(parents=True)
        demo_images[index]["image"].save(path)
    certify(dataset_name=str(tmp_path / "pictures"), split="train")
    os.utime(path, (1, 1))
    with pytest.raises(
        ValueError, match=r"dataset_fingerprint: .* \(the dataset's files were changed, copied or touched"
    ):
        certify(dataset_name=str(tmp_path / "pictures"), split="train")


def test_changed_weights_in_the_same_folder_are_refused(certify, tmp_path):
    folder = save_model(tmp_path / "model", NAMES)
    certify(every=50, model_name_or_path=folder)
    changed = MixedNoiseViTForImageClassification.from_pretrained(folder)
    changed.classifier.bias.data.add_(1)
    changed.save_pretrained(folder)
    with pytest.raises(ValueError, match="other settings \\(model_weights: "):
        certify(every=50, model_name_or_path=folder)


def test_two_runs_do_not_write_to_one_folder(certify, tmp_path):
    certify(every=100)
    writer = RunFolder(tmp_path / "run").open_shard(0)
    with pytest.raises(ValueError, match="being written by another process"):
        certify(every=100)
    writer.close()
    certify(every=100)
