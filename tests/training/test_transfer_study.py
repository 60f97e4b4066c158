import json

import pytest

DEMO = "hf_smoothing/data/cifar10_demo.parquet"


@pytest.fixture
def study(processes):
    """Run the study with models and budgets as small as possible."""

    def run(folder, *options):
        return processes.run(
            "scripts/studies/transfer_study.py", "--pretrain_dataset_name", DEMO, "--dataset_name", DEMO,
            "--eval_split", "train", "--pretrain_steps", "2", "--finetune_steps", "2", "--batch_size", "32",
            "--hidden_size", "16", "--stem_widths", "8", "8", "16", "16", "--num_hidden_layers", "1",
            "--num_attention_heads", "2", "--eval_samples", "20", "--certify_samples", "5", "--max_draws", "50",
            "--output_dir", folder, *options,
        )  # fmt: skip

    return run


def read_right(folder, arm, finetuning="clean", statistics="stored"):
    return json.loads((folder / arm / f"evaluation-{finetuning}.json").read_text())[statistics]["right"]


@pytest.mark.slow
def test_all_arms_are_trained_evaluated_and_not_trained_again(study, tmp_path):
    done = study(tmp_path, "--seeds", "3", "4", "--processes", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    arms = {(arm["pretraining"], arm["norm"], arm["finetuning"]): arm for arm in results["arms"]}
    assert len(arms) == 11
    assert arms["mixture", "layernorm", "clean"]["seeds"] == [3, 4]
    assert arms["mixture", "rmsnorm", "clean"]["seeds"] == arms["clean", "batchnorm", "mixture"]["seeds"] == [3]
    assert [name for name, arm in arms.items() if "reestimated" in arm] == [
        name for name in arms if name[1] == "batchnorm"
    ]
    compared = results["comparisons"]["LayerNorm, mixture minus clean pretraining, sigma 0.5"]
    shares = [
        [sum(read_right(tmp_path, f"{pretraining}-layernorm-{seed}")["0.5"]) / 20 for seed in (3, 4)]
        for pretraining in ("mixture", "clean")
    ]
    assert compared["seeds"] == pytest.approx([mixture - clean for mixture, clean in zip(*shares)])
    assert compared["difference"] == pytest.approx(sum(compared["seeds"]) / 2)
    assert (tmp_path / "transfer-study.png").stat().st_size > 10_000
    logs = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.log")}
    assert len(logs) == 11
    # one arm is tried again, and takes what it has trained already
    (tmp_path / "clean-layernorm-4" / "evaluation-clean.json").unlink()
    again = study(tmp_path, "--seeds", "3", "4")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "(1 of 1)" in again.stdout
    assert "training:" not in again.stderr
    assert json.loads((tmp_path / "results.json").read_text())["comparisons"] == results["comparisons"]
    other = study(tmp_path, "--seeds", "1")
    assert other.returncode == 1
    assert "other settings" in other.stderr


def test_a_budget_that_proves_nothing_is_refused_before_any_training(study, tmp_path):
    refused = study(tmp_path / "study", "--max_draws", "3")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: ")
    assert "max_draws=3" in refused.stderr
    assert not (tmp_path / "study").exists()
