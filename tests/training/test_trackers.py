"""Trackers of accelerate, tried with trackio: a training shows its curves there."""

import json
import os
import signal

import pytest

pytest.importorskip("trackio")


def test_a_resumed_training_shows_its_curves_in_one_run(processes, model, parquet, tmp_path):
    environment, folder = {"TRACKIO_DIR": str(tmp_path / "trackio")}, tmp_path / "my-model"
    command = (
        "scripts/finetune.py", "--model_name_or_path", model, "--dataset_name", parquet, "--output_dir", folder,
        "--per_device_train_batch_size", 50, "--num_train_epochs", 25, "--logging_steps", 2, "--eval_split", "train",
        "--eval_sigmas", 0, 0.25, "--eval_samples", 20, "--checkpointing_steps", 2, "--report_to", "trackio",
        "--resume_from_checkpoint", "latest",
    )  # fmt: skip
    process = processes.start(*command, environment=environment)
    while not any(folder.glob("step_*")) and process.poll(0.01) is None:
        pass
    os.kill(process.pid, signal.SIGINT)
    assert process.finish(60).returncode == 130
    done = processes.run(*command, environment=environment)
    assert done.returncode == 0, done.stderr

    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    run = ("--project", "hf-smoothing", "--run", "my-model")
    for metric in ("loss", "learning_rate", "majority_accuracy_sigma_0.25"):
        rows = [{**row, **row.get("evaluation", {})} for row in log]
        curve = {row["step"]: row[metric] for row in rows if metric in row}
        assert max(curve) == 100
        done = processes.run(
            "-m", "trackio.cli", "get", "metric", *run, "--metric", metric, "--json", environment=environment
        )
        values = json.loads(done.stdout)["values"]
        assert {value["step"]: value["value"] for value in values} == pytest.approx(curve)
    count_runs = "import trackio; print(len(trackio.Api().runs('hf-smoothing')))"
    assert processes.run("-c", count_runs, environment=environment).stdout == "1\n"
