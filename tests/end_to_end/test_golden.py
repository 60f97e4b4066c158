"""The same seeds give the same figures as before: certificates, trained weights, an audit, a report.

Where a change is meant to alter a figure, write `golden.json` again with `python tests/end_to_end/test_golden.py`, and say
in the commit which figures changed and why.
"""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

GOLDEN = Path(__file__).with_name("golden.json")
MODEL = "model_cards/mixed-noise-vit-nano-cifar10"
COLUMNS = ("index", "sigma", "prediction", "radius", "counts", "num_samples")

CERTIFY = {
    "decide": ("--radii", 0, 0.25, 0.5, "--max_draws", 200),
    "find": ("--max_draws", 200),
    "fixed": ("--method", "fixed", "--n0", 20, "--n", 100),
    "surrogate": ("--method", "surrogate", "--delta", 0.1, "--count_head", f"{MODEL}-counts"),
    "guided": ("--radii", 0.25, "--max_draws", 200, "--count_head", f"{MODEL}-counts"),
    "counts": ("--method", "counts", "--n", 16),
}
STEPS = (
    "--per_device_train_batch_size", 10, "--max_train_steps", 5, "--logging_steps", 1, "--dataset_name", "PARQUET",
    "--train_split", "train",
)  # fmt: skip
TRAIN = {
    "finetune": (
        "scripts/finetune.py", "--model_name_or_path", MODEL, "--sigmas", 0, 0.25, 0.5, "--consistency_weight", 5,
        "--ema_decay", 0.9, *STEPS,
    ),
    "pretrain": ("scripts/pretrain.py", "--num_hidden_layers", 1, "--hidden_size", 64, *STEPS),
    "count_head": (
        "scripts/train_count_head.py", "--model_name_or_path", MODEL, "--counts", "RUNS/counts",
        "--per_device_train_batch_size", 3, "--max_train_steps", 5, "--logging_steps", 1, "--own_backbone", "--loss",
        "logistic_normal",
    ),
}  # fmt: skip


def collect(run, parquet, folder):
    """
    Run the commands and read what they wrote.

    Args:
        run: runs a command line from the root of the repository: a script or `hf-smoothing`, and its arguments.
        parquet: the shipped images.
        folder: an empty folder for the results.
    """
    words = {"PARQUET": parquet, "RUNS/counts": folder / "counts"}
    golden = {"certificates": {}, "training": {}}
    for name, options in CERTIFY.items():
        run(
            "scripts/certify.py", "--model_name_or_path", MODEL, "--dataset_name", parquet, "--every", 80, "--sigma", 0.25,
            0.5, "--seed", 0, *options, "--output_dir", folder / name,
        )  # fmt: skip
        table = pq.read_table(folder / name / "certificates.parquet", columns=list(COLUMNS))
        golden["certificates"][name] = [list(row.values()) for row in table.to_pylist()]
    for name, command in TRAIN.items():
        run(*(words.get(word, word) for word in command), "--output_dir", folder / name)
        log = [json.loads(line) for line in (folder / name / "training_log.jsonl").read_text().splitlines()]
        weights = load_file(folder / name / "model.safetensors")
        golden["training"][name] = {
            "losses": [step["loss"] for step in log],
            "mean_absolute_weights": {tensor: weights[tensor].abs().mean().item() for tensor in sorted(weights)[::9]},
        }
    attack = ("--images", 2, "--sigma", 0.25, "--steps", 3, "--directions", 2, "--n", 50)
    run("hf-smoothing", "audit", folder / "decide", *attack, "--output-dir", folder / "audit")
    audit = json.loads((folder / "audit" / "audit.json").read_text())
    golden["audit"] = {name: value for name, value in audit["by_sigma"][0].items() if value is not None}
    runs = [f"{MODEL}/results/cifar10/sigma-{sigma}" for sigma in ("0.25", "0.5")]
    run("hf-smoothing", "report", *runs, "--envelope", "--output-dir", folder / "report")
    report = json.loads((folder / "report" / "report.json").read_text())
    golden["report"] = {
        result["title"]: [
            [row["radius"], row["share"], *(row["interval_95"] or ())] for row in result["certified_accuracy"]
        ]
        for result in report["results"]
    }
    return golden


@pytest.fixture(scope="module")
def computed(processes, tmp_path_factory):
    def run(*command):
        done = processes.run(*command)
        assert done.returncode == 0, done.stderr

    return collect(run, "hf_smoothing/data/cifar10_demo.parquet", tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", CERTIFY)
def test_certificates(computed, golden, name):
    certificates, expected = computed["certificates"][name], golden["certificates"][name]
    assert len(certificates) == 6
    radius = COLUMNS.index("radius")
    for row, expected_row in zip(certificates, expected, strict=True):
        assert row.pop(radius) == pytest.approx(expected_row.pop(radius), rel=1e-6)
        assert row == expected_row


@pytest.mark.parametrize("name", TRAIN)
def test_five_training_steps(computed, golden, name):
    training, expected = computed["training"][name], golden["training"][name]
    assert training["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert training["mean_absolute_weights"] == pytest.approx(expected["mean_absolute_weights"], rel=1e-4)


def test_an_audit(computed, golden):
    assert computed["audit"] == pytest.approx(golden["audit"], rel=1e-3)


def test_a_report(computed, golden):
    assert computed["report"].keys() == golden["report"].keys()
    for title, rows in computed["report"].items():
        for row, expected_row in zip(rows, golden["report"][title], strict=True):
            assert row == pytest.approx(expected_row)


if __name__ == "__main__":
    import subprocess
    import tempfile

    def run_command(*command):
        first = command[0]
        script = [Path(sys.executable).parent / first] if first == "hf-smoothing" else [sys.executable, first]
        subprocess.run([str(word) for word in (*script, *command[1:])], check=True)

    with tempfile.TemporaryDirectory() as output:
        values = collect(run_command, "hf_smoothing/data/cifar10_demo.parquet", Path(output))
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
