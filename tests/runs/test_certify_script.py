"""The script that certifies a dataset, with several processes, and with processes that are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest
from helpers.finished_runs import rows
from helpers.paths import ROOT

from hf_smoothing.runs.dataset_run import RunSettings, certify_dataset
from hf_smoothing.utils.processes import start_processes

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--")


def command(model, data, output_dir, *options):
    return (
        "scripts/certify.py", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", output_dir,
        "--sigma", 0.25, 0.5, "--max_draws", 200, "--seed", 0, *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(model, parquet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    settings = RunSettings(model_name_or_path=model, dataset_name=parquet, sigmas=(0.25, 0.5), max_draws=200, seed=0)
    certify_dataset(settings, folder, accelerator=start_processes())
    found = rows(folder)
    assert len({row["prediction"] for row in found}) > 2
    return found


def num_lines(folder):
    return sum(shard.read_bytes().count(b"\n") for shard in Path(folder).glob("shards/*.jsonl"))


def kill_at_random(started, folder, generator, only_one=False):
    """Kill processes (SIGKILL), or one of those that a launcher started, at a random moment after a few more records."""
    enough = num_lines(folder) + generator.randrange(1, 40)
    while num_lines(folder) < enough and started[0].poll(0.002) is None:
        pass
    time.sleep(generator.random() * 0.05)
    for process in started:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            for member in family[-1:] if only_one and family else (psutil.Process(process.pid), *family):
                if member.is_running():
                    member.kill()
    for process in started:
        process.finish(120)  # ends by itself where only one was killed: no deadlock


def check_resumed(processes, resume, folder, expected):
    """Resume a run with two processes; it has the records of an uninterrupted run, none lost and none twice."""
    for done in [process.finish() for process in processes.start_ranks(2, *resume)]:
        assert done.returncode == 0, done.stderr
    assert rows(folder) == expected
    assert num_lines(folder) == len(expected)


def test_two_processes_give_the_records_of_one(processes, model, parquet, uninterrupted, tmp_path):
    done = processes.run(*TORCHRUN, *command(model, parquet, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "400 records in" in done.stdout
    assert rows(tmp_path) == uninterrupted
    shards = sorted(tmp_path.glob("shards/*.jsonl"))
    assert [shard.name for shard in shards] == ["records-rank00000.jsonl", "records-rank00001.jsonl"]
    assert all(shard.read_bytes().count(b"\n") > 50 for shard in shards)
    assert json.loads((tmp_path / "run.json").read_text())["sessions"][0]["num_processes"] == 2


@pytest.mark.parametrize("start", ["command", "script"])
def test_ctrl_c_says_how_many_images_are_done(processes, model, parquet, tmp_path, start):
    options = (
        "--model", model, "--dataset", parquet, "--output-dir", tmp_path, "--sigma", 0.25, "--sigma", 0.5,
        "--max-draws", 200,
    )  # fmt: skip
    words = ("hf-smoothing", "certify-dataset", *options) if start == "command" else command(model, parquet, tmp_path)
    process = processes.start(*words)
    while num_lines(tmp_path) < 3 and process.poll(0.002) is None:
        pass
    os.kill(process.pid, signal.SIGINT)
    done = process.finish(60)
    assert done.returncode == 130, done.stderr
    assert 3 <= num_lines(tmp_path) < 400
    assert f"stopped; {num_lines(tmp_path)} of 400 are done; the same command resumes the run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_processes_lose_nothing(processes, model, parquet, uninterrupted, tmp_path, num_processes):
    run = command(model, parquet, tmp_path)
    kill_at_random(processes.start_ranks(num_processes, *run), tmp_path, random.Random(0))
    assert num_lines(tmp_path) < 400
    check_resumed(processes, run, tmp_path, uninterrupted)


def test_killed_counting_loses_nothing_and_repeats_nothing(processes, model, parquet, tmp_path, capfd):
    settings = RunSettings(model, parquet, (0.25, 0.5), every=4, method="counts", n=20, seed=0)
    certify_dataset(settings, tmp_path / "uninterrupted", accelerator=start_processes())
    shown = capfd.readouterr().err
    assert "counting: 100%" in shown
    assert "draws/s" in shown
    assert "certified" not in shown  # counts are no certificates
    counted = rows(tmp_path / "uninterrupted")
    assert {sum(row["counts"]) for row in counted} == {20}
    run = command(model, parquet, tmp_path / "killed", "--every", 4, "--method", "counts", "--n", 20)
    kill_at_random([processes.start(*run)], tmp_path / "killed", random.Random(2))
    assert num_lines(tmp_path / "killed") < 100
    check_resumed(processes, run, tmp_path / "killed", counted)


@pytest.mark.slow
def test_twenty_times_killed_processes_lose_nothing(processes, model, parquet, uninterrupted, tmp_path):
    run = command(model, parquet, tmp_path)
    generator = random.Random(1)
    for kill in range(20):
        launcher = generator.choice(((), TORCHRUN))
        kill_at_random([processes.start(*launcher, *run)], tmp_path, generator, only_one=kill % 3 == 1)
    check_resumed(processes, run, tmp_path, uninterrupted)


@pytest.mark.slow
def test_the_benchmark_of_interruptions_finds_nothing_lost_or_doubled(tmp_path):
    script = [
        sys.executable,
        "scripts/benchmarks/interruptions.py",
        "--kills",
        "40",
        "--output",
        tmp_path / "kills.json",
    ]
    done = subprocess.run(
        script, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "kills.json").read_text())
    assert results["kills"] >= 40
    assert results["records"] == 2000 * results["runs"]
    assert results["lost"] == results["doubled"] == results["changed"] == 0


def test_an_error_ends_all_processes(processes, model, parquet, tmp_path):
    run = command(model, parquet, tmp_path, "--image_column", "pic")
    ended = [process.finish(120) for process in processes.start_ranks(2, *run)]
    assert all(done.returncode != 0 for done in ended)
    assert any("There is no column 'pic'; the dataset has: image, label." in done.stderr for done in ended)


def test_uv_takes_the_package_from_the_clone():
    """The block of PEP 723 at the top of the script, as uv reads it (the path is relative to the script)."""
    script = ROOT / "scripts" / "certify.py"
    block = script.read_text().partition("# /// script\n")[2].partition("# ///\n")[0]
    metadata = tomllib.loads("".join(line.removeprefix("# ").removeprefix("#") for line in block.splitlines(True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["requires-python"] == project["requires-python"]
    assert metadata["dependencies"] == [project["name"]]
    source = metadata["tool"]["uv"]["sources"][project["name"]]
    assert (script.parent / source["path"]).resolve() == ROOT
