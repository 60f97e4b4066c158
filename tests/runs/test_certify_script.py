"""The script that certifies a dataset, with several processes, and with processes that are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.finished_runs import rows
from helpers.paths import ROOT

from hf_smoothing.runs.dataset_run import RunSettings, certify_dataset
from hf_smoothing.utils.processes import start_processes


def script(model, data, output_dir, *arguments, processes=2):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "--"] if processes else []
    )
    return start(
        sys.executable, *launcher, ROOT / "scripts" / "certify.py", "--model_name_or_path", model,
        "--dataset_name", data, "--output_dir", output_dir, "--sigma", 0.25, 0.5, "--max_draws", 200, *arguments,
    )  # fmt: skip


def start(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [str(one) for one in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def uninterrupted(model, parquet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    settings = RunSettings(model_name_or_path=model, dataset_name=parquet, sigmas=(0.25, 0.5), max_draws=200)
    certify_dataset(settings, folder, accelerator=start_processes())
    found = rows(folder)
    assert len({row["prediction"] for row in found}) > 2
    return found


def num_lines(folder):
    return sum(shard.read_bytes().count(b"\n") for shard in Path(folder).glob("shards/*.jsonl"))


def kill_at_random(process, folder, generator, only_one):
    """Kill -9 the launcher and its processes, or one of the latter, at some moment after a few more records."""
    enough = num_lines(folder) + generator.randrange(1, 40)
    while num_lines(folder) < enough and process.poll() is None:
        time.sleep(0.002)
    time.sleep(generator.random() * 0.05)
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        for one in family[-1:] if only_one and family else (psutil.Process(process.pid), *family):
            if one.is_running():
                one.kill()
    process.communicate(timeout=120)  # ends by itself where only one was killed: no deadlock


def kill_and_go_on(model, parquet, folder, uninterrupted, kills, seed, *arguments):
    generator = random.Random(seed)
    for kill in range(kills):
        process = script(
            model, parquet, folder, *arguments, processes=generator.choice((0, 2))
        )  # 0: without a launcher
        kill_at_random(process, folder, generator, only_one=kill % 3 == 1)
    before = num_lines(folder)
    finish(script(model, parquet, folder, *arguments))
    assert rows(folder) == uninterrupted
    assert num_lines(folder) == len(uninterrupted)
    return before


def test_two_processes_give_the_records_of_one(model, parquet, uninterrupted, tmp_path):
    output = finish(script(model, parquet, tmp_path))
    assert "400 records in" in output
    assert rows(tmp_path) == uninterrupted
    shards = sorted(tmp_path.glob("shards/*.jsonl"))
    assert [shard.name for shard in shards] == ["records-rank00000.jsonl", "records-rank00001.jsonl"]
    assert all(shard.read_bytes().count(b"\n") > 50 for shard in shards)
    assert json.loads((tmp_path / "run.json").read_text())["sessions"][0]["num_processes"] == 2


@pytest.mark.parametrize("command", [True, False])
def test_ctrl_c_says_how_far_it_is(model, parquet, tmp_path, command):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes inherit it where a shell had it ignored
    if command:
        process = start(
            Path(sys.executable).parent / "hf-smoothing", "certify-dataset", "--model", model, "--dataset", parquet,
            "--output-dir", tmp_path, "--sigma", 0.25, "--sigma", 0.5, "--max-draws", 200,
        )  # fmt: skip
    else:
        process = script(model, parquet, tmp_path, processes=0)
    while num_lines(tmp_path) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert 3 <= num_lines(tmp_path) < 400
    assert f"stopped; {num_lines(tmp_path)} of 400 are done; the same command resumes the run" in output
    assert "Traceback" not in output


def test_killed_processes_lose_nothing(model, parquet, uninterrupted, tmp_path):
    assert kill_and_go_on(model, parquet, tmp_path, uninterrupted, kills=1, seed=0) < 400


def test_killed_counting_loses_nothing_and_repeats_nothing(model, parquet, tmp_path, capfd):
    settings = RunSettings(model, parquet, (0.25, 0.5), every=4, method="counts", n=20)
    certify_dataset(settings, tmp_path / "uninterrupted", accelerator=start_processes())
    shown = capfd.readouterr().err
    assert "counting: 100%" in shown
    assert "draws/s" in shown
    assert "certified" not in shown  # counts are no certificates
    counted = rows(tmp_path / "uninterrupted")
    assert {sum(row["counts"]) for row in counted} == {20}
    arguments = ("--every", 4, "--method", "counts", "--n", 20)
    assert kill_and_go_on(model, parquet, tmp_path / "killed", counted, 1, 2, *arguments) < 100


@pytest.mark.slow
def test_twenty_times_killed_processes_lose_nothing(model, parquet, uninterrupted, tmp_path):
    kill_and_go_on(model, parquet, tmp_path, uninterrupted, kills=20, seed=1)


def test_an_error_in_processes_ends_them_all(model, parquet, tmp_path):
    process = script(model, parquet, tmp_path, "--image_column", "pic")
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "There is no column 'pic'; the dataset has: image, label." in output
