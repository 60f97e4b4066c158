"""What a user of the training scripts sees: refusals before any loading, accuracies, where files are, Ctrl-C."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from helpers.paths import ROOT, SHIPPED_MODEL

from hf_smoothing.hub.push import plan_push
from hf_smoothing.metrics.certified_accuracy import exact_interval
from hf_smoothing.training.training_log import describe_figures, describe_training


def finetune(model, parquet, folder, *more):
    return (
        "scripts/finetune.py", "--model_name_or_path", model, "--dataset_name", parquet, "--output_dir", folder,
        "--per_device_train_batch_size", 50, "--eval_sigmas", 0, 0.25, "--eval_samples", 20, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(processes, model, parquet, tmp_path_factory):
    """A short training: its folder, and what it showed."""
    folder = tmp_path_factory.mktemp("trained") / "my-model"
    command = finetune(model, parquet, folder, "--num_train_epochs", 2, "--eval_split", "train")
    return folder, processes.run(*command)


def test_finetune_prints_accuracies_and_where_it_wrote(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    assert "epoch 1: accuracy " in done.stdout
    last = done.stdout.splitlines()[-2:]
    assert "Trained 8 steps in" in last[0]
    assert "% at sigma 0.25 (majority of 5 noisy copies, split 'train')" in last[0]
    assert last[1] == f"Wrote the model, its card and results/training.json to {folder}."


def test_the_card_of_a_finetuned_model_tells_its_training(trained, model, parquet):
    folder, _ = trained
    model, parquet, text = Path(model), Path(parquet), (folder / "README.md").read_text()
    assert (
        f"Finetuned from `{model.name}` on 200 images of `{parquet.name}`, without noise: 2 epochs, 8 steps, in"
        in text
    )
    assert re.search(r"It is right on [\d.]+% of images without noise and [\d.]+% at sigma 0.25 \(split `train`", text)
    assert f"scripts/finetune.py --model_name_or_path {model.name} --dataset_name {parquet.name} --output_dir" in text
    pages = "".join(path.read_text() for path in (folder, folder / "results") for path in path.glob("*.md"))
    assert not re.search(r"[ `]/\w", pages)  # no path of this machine


def test_the_same_command_is_refused_before_anything_is_loaded(processes, trained, tmp_path):
    folder, _ = trained
    done = processes.run(*finetune("no/such-model", tmp_path / "no-images.parquet", folder))
    assert done.returncode == 1
    assert f"error: {folder} holds a training: resume it" in done.stderr


def test_ctrl_c_says_how_to_resume(processes, model, parquet, tmp_path):
    folder = tmp_path / "stopped"
    command = finetune(model, parquet, folder, "--num_train_epochs", 5000, "--checkpointing_steps", 2)
    process = processes.start(*command)
    while not (folder / "preprocessor_config.json").is_file() and process.poll(0.01) is None:
        pass
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    done = process.finish(60)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "of 20000; the last checkpoint is of step" in done.stderr
    assert "`--resume_from_checkpoint latest` resumes from it" in done.stderr
    # what there is of it is not published by mistake
    with pytest.raises(ValueError, match=r"was cut short.*--allow-unfinished"):
        plan_push(folder, "user/stopped")
    with pytest.warns(UserWarning, match="has no card"):
        assert plan_push(folder, "user/stopped", allow_unfinished=True).repo_type == "model"


def test_a_finished_training_is_published_and_asks_for_a_license_only(trained):
    folder, _ = trained
    with pytest.warns(UserWarning, match="card") as warned:
        assert "model.safetensors" in plan_push(folder, "user/my-model").sizes
    (said,) = [str(warning.message) for warning in warned if "card" in str(warning.message)]
    assert "names no license" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base_share", "1"], "base_share=1.0 must be 0 or above, and below 1."),
        (["--base_share", "-0.1"], "base_share=-0.1 must be 0 or above, and below 1."),
        (["--base_share", "0.25", "--freeze_backbone", "true"], "base_share does nothing with freeze_backbone"),
    ],
)
def test_a_share_of_the_base_that_makes_no_sense_is_refused(processes, model, parquet, tmp_path, options, message):
    done = processes.run(*finetune(model, parquet, tmp_path / "out", *options))
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_idle_cores_are_named(processes, model, parquet, tmp_path):
    """`accelerate launch` gives a process on CPUs one thread; the variable is what tells that it launched."""
    run = ("scripts/certify.py", "--model_name_or_path", model, "--dataset_name", parquet, "--split", "train[:2]")
    run += ("--sigma", 0.25, "--max_draws", 60)
    launched = processes.run(*run, "--output_dir", tmp_path / "a", environment={"ACCELERATE_MIXED_PRECISION": "no"})
    assert launched.returncode == 0, launched.stderr
    alone = processes.run(*run, "--output_dir", tmp_path / "b")
    said = "--num_cpu_threads_per_process"
    assert (said in launched.stderr, said in alone.stderr) == (os.cpu_count() > 1, False)


def test_figures_are_told_in_words():
    assert describe_figures({"majority_accuracy_sigma_0.5": 0.25}) == "accuracy 25.0% at sigma 0.5"
    assert describe_figures({"jensen_shannon": 0.12344}) == "jensen_shannon 0.1234"
    results = {"steps": 1000, "seconds": 5.0, "final_loss": 0.5, "evaluation": None, "settings": {"eval_split": None}}
    assert "; --eval_split would tell its accuracy." in describe_training(results, "out")


def test_a_flag_may_be_repeated(processes, model, parquet, tmp_path):
    done = processes.run(
        "scripts/certify.py", "--model_name_or_path", model, "--dataset_name", parquet, "--split", "train[:2]",
        "--sigma", 0.25, "--sigma", 0.5, "--max_draws", 60, "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 records in" in done.stdout


def test_the_certify_script_turns_the_errors_of_the_command_into_messages(processes, model, parquet, tmp_path):
    # a method that takes no such setting is a ValueError, a device that does not exist a RuntimeError
    done = processes.run(
        "scripts/certify.py", "--model_name_or_path", model, "--dataset_name", parquet, "--sigma", 0.25,
        "--output_dir", tmp_path / "run", "--device", "nothing",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_accuracy_under_noise_of_all_images(processes, parquet, tmp_path):
    output = tmp_path / "results" / "evaluation.json"
    done = processes.run(
        ROOT / "scripts" / "accuracy_under_noise.py", "--model_name_or_path", SHIPPED_MODEL, "--dataset_name", parquet,
        "--eval_split", "train", "--eval_samples", 500, "--eval_draws", 1, "--eval_sigmas", 0, 4, "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["command"].startswith(
        "scripts/accuracy_under_noise.py "
    )  # although it was started by its full path
    assert results["dataset"]["images"] == 200  # not the 500 that were asked for
    clean, noise = results["accuracies"]
    assert (clean["sigma"], noise["sigma"]) == (0, 4)
    assert clean["accuracy"] > 0.7
    assert noise["accuracy"] < 0.4
    for row in results["accuracies"]:
        assert row["interval_95"] == pytest.approx(exact_interval(round(200 * row["accuracy"]), 200))
