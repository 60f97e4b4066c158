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
            "--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--eval_samples", "20",
            "--certify_samples", "5", "--max_draws", "50", "--output_dir", folder, *options,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_all_arms_are_trained_evaluated_and_not_trained_again(study, tmp_path):
    done = study(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    arms = {(arm["pretraining"], arm["norm"], arm["finetuning"]) for arm in results["arms"]}
    assert len(arms) == 12
    right = json.loads((tmp_path / "finetuned-clean-layernorm-clean" / "results" / "evaluation.json").read_text())[
        "right"
    ]
    mixed = json.loads((tmp_path / "finetuned-mixture-layernorm-clean" / "results" / "evaluation.json").read_text())[
        "right"
    ]
    compared = results["comparisons"]["layernorm, mixture minus clean pretraining, both finetuned clean, sigma 0.5"]
    assert compared["difference"] == pytest.approx((sum(mixed["0.5"]) - sum(right["0.5"])) / 20)
    assert (tmp_path / "transfer-study.png").stat().st_size > 10_000
    again = study(tmp_path)
    assert "training:" not in again.stderr
    other = study(tmp_path, "--seed", "1")
    assert other.returncode == 1
    assert "other settings" in other.stderr


def test_a_budget_that_proves_nothing_is_refused_before_any_training(study, tmp_path):
    refused = study(tmp_path / "study", "--max_draws", "3")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: ")
    assert "max_draws=3" in refused.stderr
    assert not (tmp_path / "study").exists()
