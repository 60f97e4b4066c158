import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers.paths import SHIPPED_MODEL
from safetensors.torch import load_file
from torch import nn

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification
from hf_smoothing.training.parameter_groups import group_parameters
from hf_smoothing.training.training_loop import TrainingLoop, TrainingSettings

ROOT = Path(__file__).parents[2]


class Batches:
    """Stand-in for TrainingBatches with fixed content: random pixels, labels by brightness."""

    def __init__(self, batch_size=8, batches=6):
        self.batch_size, self.total = batch_size, batch_size * batches
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (batches, batch_size, 3, 8, 8), generator=generator, dtype=torch.uint8)
        self.labels = (self.pixels.float().mean((2, 3, 4)) > 127.5).long()

    def __len__(self):
        return len(self.pixels)

    def epoch(self, number, first=0):
        return iter(list(zip(self.pixels, self.labels))[first:])


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    config = MixedNoiseViTConfig(image_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, **kwargs)
    return MixedNoiseViTForImageClassification(config)


def loss_with_noise(model, pixels, labels):
    pixels = pixels.float() / 255
    return nn.functional.cross_entropy(model(pixels + 0.1 * torch.randn_like(pixels)).logits, labels)


def plain_loss(model, pixels, labels):
    return nn.functional.cross_entropy(model(pixels.float() / 255).logits, labels)


def run(settings, model=None, batches=None, loss=loss_with_noise, evaluate=None, fixed_settings=None):
    model = model or build(drop_path_rate=0.3)
    accelerator = settings.create_accelerator()
    loop = TrainingLoop(
        model,
        batches or Batches(),
        loss,
        settings,
        accelerator,
        fixed_settings=fixed_settings or {},
        evaluate=evaluate,
    )
    results = loop.run()
    accelerator.free_memory()
    return results


@pytest.fixture
def settings(tmp_path):
    return TrainingSettings(str(tmp_path / "out"), num_train_epochs=3, logging_steps=4, ema_decay=0.9)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "training_log.jsonl").read_text().splitlines()]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("checkpointing", "accumulation", "muon"), [("epoch", 1, 0.0), ("4", 1, 0.03), ("5", 2, 0.0)])
def test_an_interrupted_training_ends_with_the_same_weights(settings, tmp_path, checkpointing, accumulation, muon):
    settings = replace(
        settings,
        checkpointing_steps=checkpointing,
        gradient_accumulation_steps=accumulation,
        muon_learning_rate=muon,
    )

    def evaluate(model):
        return {"weight": model.classifier.weight.sum().item()}

    uninterrupted = run(settings, evaluate=evaluate)
    calls = 0

    def failing_loss(model, pixels, labels):
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return loss_with_noise(model, pixels, labels)

    interrupted = replace(settings, output_dir=str(tmp_path / "interrupted"), resume_from_checkpoint="latest")
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step \d+ of .*--resume_from_checkpoint latest"):
        run(interrupted, loss=failing_loss, evaluate=evaluate)
    for state in Path(interrupted.output_dir).glob("step_*/random_states_*"):  # steps are seeded by their number alone
        state.unlink()
    resumed = run(interrupted, model=build(seed=5, drop_path_rate=0.3), evaluate=evaluate)
    assert same(weights(interrupted.output_dir), weights(settings.output_dir))
    assert log(interrupted.output_dir) == log(settings.output_dir)
    assert resumed["final_loss"] == uninterrupted["final_loss"]


def test_another_seed_gives_other_weights(settings, tmp_path):
    run(settings)
    other = replace(settings, output_dir=str(tmp_path / "other"), seed=1)
    run(other)
    assert not same(weights(other.output_dir), weights(settings.output_dir))


def test_accumulated_batches_equal_one_large_batch(settings, tmp_path):
    large = Batches(16, 6)
    small = Batches(8, 12)
    small.pixels = large.pixels.view(12, 8, 3, 8, 8)
    small.labels = large.labels.view(12, 8)
    run(settings, build(), large, plain_loss)
    accumulated = replace(settings, output_dir=str(tmp_path / "other"), gradient_accumulation_steps=2)
    run(accumulated, build(), small, plain_loss)
    for name, weight in weights(settings.output_dir).items():
        torch.testing.assert_close(weights(accumulated.output_dir)[name], weight, atol=2e-4, rtol=1e-3)


def test_the_loss_falls(settings):
    results = run(replace(settings, num_train_epochs=15, ema_decay=0.0), build(), Batches(), plain_loss)
    assert results["final_loss"] < 0.5
    assert results["images_seen"] == 15 * 48


def test_the_ema_is_saved(settings, tmp_path):
    run(settings)
    plain = replace(settings, output_dir=str(tmp_path / "plain"), ema_decay=0.0)
    run(plain)
    assert not same(weights(settings.output_dir), weights(plain.output_dir))
    last = load_file(tmp_path / "out" / "step_18" / "model.safetensors")
    assert same({name: last[name] for name in weights(plain.output_dir)}, weights(plain.output_dir))


def test_frozen_parameters_do_not_change(settings):
    model = build(drop_path_rate=0.5)
    model.mixed_noise_vit.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    features = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    run(replace(settings, num_train_epochs=2, ema_decay=0.0), model, Batches(batches=1), plain_loss)
    after = weights(settings.output_dir)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert torch.equal(features[0], features[1])  # no dropped paths in frozen layers


def test_parameter_groups():
    model = build()
    encoder = model.mixed_noise_vit.encoder
    groups = {
        id(parameter): group for group in group_parameters(model, 1.0, 0.1, 0.5) for parameter in group["params"]
    }
    assert len(groups) == len(list(model.parameters()))
    rates = [groups[id(block.attn.qkv.weight)]["lr"] for block in encoder.blocks]
    assert rates[1] == 2 * rates[0]
    assert rates[2] == 2 * rates[1]
    assert groups[id(encoder.pos_embed)]["lr"] == rates[0] / 2
    assert groups[id(model.classifier.weight)]["lr"] == 1
    decaying = {name for name, parameter in model.named_parameters() if groups[id(parameter)]["weight_decay"] > 0}
    assert all(parameter.ndim > 1 for name, parameter in model.named_parameters() if name in decaying)
    assert "mixed_noise_vit.encoder.pos_embed" not in decaying
    assert "classifier.weight" in decaying
    assert {group["lr"] for group in group_parameters(model, 1.0, 0.1, 1.0)} == {1.0}


def test_a_folder_with_a_training_is_not_overwritten(settings):
    run(settings)
    with pytest.raises(ValueError, match="resume_from_checkpoint latest"):
        run(settings)


def test_a_checkpoint_of_another_training_is_refused(settings):
    fixed_settings = {"dataset": "one", "config": {"stem": "conv", "norm_layer": "layernorm"}}
    run(settings, fixed_settings=fixed_settings)
    again = replace(settings, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="dataset: 'one' -> 'two'"):
        run(again, fixed_settings={**fixed_settings, "dataset": "two"})
    with pytest.raises(ValueError, match=r"learning_rate: 0.0015 -> 0.1"):
        run(replace(again, learning_rate=0.1), fixed_settings=fixed_settings)
    other = {
        **fixed_settings,
        "config": {"stem": "conv", "norm_layer": "batchnorm"},
    }  # the error names only what differs
    with pytest.raises(ValueError, match=r"other settings \(config\.norm_layer: 'layernorm' -> 'batchnorm'\)"):
        run(again, fixed_settings=other)
    with pytest.raises(ValueError, match="no checkpoint at 'nowhere'"):
        run(replace(settings, resume_from_checkpoint="nowhere"))


def test_resuming_a_finished_training_changes_nothing(settings):
    finished = run(settings)
    before = log(settings.output_dir)
    again = run(replace(settings, resume_from_checkpoint="latest"))
    assert log(settings.output_dir) == before
    assert again["final_loss"] == finished["final_loss"]


def test_resuming_saves_the_model_if_its_saving_was_interrupted(settings):
    settings = replace(settings, checkpointing_steps="6", resume_from_checkpoint="latest", num_train_epochs=1)

    def fail(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings, evaluate=fail)
    run(settings)
    assert weights(settings.output_dir)


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(settings):
    """Even if the loss is not logged yet."""
    settings = replace(settings, checkpointing_steps="2", logging_steps=1000, ema_decay=0.0)
    steps = []

    def breaking_loss(model, pixels, labels):
        steps.append(len(steps))
        if len(steps) == 4:
            with torch.no_grad():
                model.classifier.weight.fill_(float("nan"))
        return plain_loss(model, pixels, labels)

    with pytest.raises(FloatingPointError, match="no longer finite by step 4"):
        run(settings, loss=breaking_loss)
    (checkpoint,) = Path(settings.output_dir).glob("step_*")
    assert checkpoint.name == "step_2"
    assert all(torch.isfinite(weight).all() for weight in load_file(checkpoint / "model.safetensors").values())
    assert not (Path(settings.output_dir) / "model.safetensors").exists()


def test_resuming_from_an_earlier_checkpoint(settings):
    settings = replace(settings, checkpointing_steps="4", num_train_epochs=2)
    run(settings)
    uninterrupted = weights(settings.output_dir)
    other = replace(settings, output_dir=settings.output_dir + "-2")

    def for_six_steps(left, *given):
        if next(left) == 0:
            raise KeyboardInterrupt
        return loss_with_noise(*given)

    with pytest.raises(KeyboardInterrupt):
        run(other, loss=partial(for_six_steps, count(6, -1)))
    earlier = Path(other.output_dir) / "earlier"
    shutil.copytree(Path(other.output_dir) / "step_4", earlier)
    with pytest.raises(KeyboardInterrupt):
        run(replace(other, resume_from_checkpoint="latest"), loss=partial(for_six_steps, count(6, -1)))
    assert (Path(other.output_dir) / "step_8").is_dir()  # the training resumed from step 4 reaches step 8 again
    run(replace(other, resume_from_checkpoint=str(earlier)))
    assert same(weights(other.output_dir), uninterrupted)


def test_a_finished_model_without_checkpoints_is_not_overwritten(settings):
    results = Path(settings.output_dir) / "results"
    results.mkdir(parents=True)
    (results / "training.json").write_text("{}")
    with pytest.raises(ValueError, match="a finished model and no checkpoint"):
        run(replace(settings, resume_from_checkpoint="latest"))


def test_a_loss_that_is_not_finite_stops_the_training(settings):
    with pytest.raises(FloatingPointError, match="by step 4"):
        run(settings, loss=lambda *given: plain_loss(*given) * float("nan"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_train_epochs": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"ema_decay": 1.0},
        {"layer_decay": 1.5},
        {"warmup_ratio": -0.1},
        {"checkpointing_steps": "often"},
        {"checkpointing_steps": "0"},
        {"mixed_precision": "fp8"},
        {"max_grad_norm": 0.0},
        {"weight_decay": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingSettings("somewhere", **wrong)


def test_too_few_batches_for_an_update(settings):
    with pytest.raises(ValueError, match="gradient_accumulation_steps=7"):
        run(replace(settings, gradient_accumulation_steps=7))


TINY = [
    "--dataset_name", "hf_smoothing/data/cifar10_demo.parquet", "--per_device_train_batch_size", "20",
    "--num_train_epochs", "3", "--logging_steps", "2", "--checkpointing_steps", "4",
    "--resume_from_checkpoint", "latest", "--ema_decay", "0.9",
]  # fmt: skip


SMALL = ("--hidden_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--drop_path_rate", "0.2")


def kill_after_a_checkpoint(processes, folder, command):
    """Start a training and kill it (SIGKILL) when it has written a checkpoint, before it ends."""
    for _ in range(5):
        process = processes.start(*command)
        while not list(folder.glob("step_*")) and process.poll(0.005) is None:
            pass
        process.kill()
        process.finish()
        if not (folder / "results").exists():
            return
        shutil.rmtree(folder)  # on a busy machine it may have ended before
    raise AssertionError("The training always ends before it is killed.")


def test_pretrain_kill_resume_and_finetune_with_two_processes(processes, tmp_path):
    pretrained, killed, finetuned = tmp_path / "pretrained", tmp_path / "killed", tmp_path / "finetuned"
    pretrain = ("scripts/pretrain.py", *TINY, *SMALL, "--output_dir")
    done = processes.run(*pretrain, pretrained)
    assert done.returncode == 0, done.stderr
    kill_after_a_checkpoint(processes, killed, (*pretrain, killed))
    done = processes.run(*pretrain, killed)
    assert done.returncode == 0, done.stderr
    assert same(weights(killed), weights(pretrained))
    assert log(killed) == log(pretrained)

    done = processes.run(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "scripts/finetune.py", *TINY,
        "--model_name_or_path", pretrained, "--output_dir", finetuned, "--eval_split", "train", "--eval_samples", "20",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((finetuned / "results" / "training.json").read_text())
    assert results["num_processes"] == 2
    assert results["images_seen"] == 3 * 200
    assert set(results["evaluation"]) == {f"majority_accuracy_sigma_{sigma}" for sigma in ("0", "0.25", "0.5", "1")}
    assert results["continues"]["settings"]["sigmas"] == [0, 0.25, 0.5, 1]
    model = MixedNoiseViTForImageClassification.from_pretrained(finetuned)
    assert model.config.id2label[6] == "frog"


def test_the_short_training_of_the_guide(tmp_path):
    """The command as it is written there, from the root of the repository, by a real `accelerate launch`."""
    guide = (ROOT / "scripts" / "README.md").read_text()
    (command,) = re.findall(r"accelerate launch (scripts/finetune\.py (?:.*\\\n)*.* runs/tiny)\n", guide)
    words = shlex.split(command.replace("\\\n", " ").replace("runs/tiny", str(tmp_path / "tiny")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "tiny" / "results" / "training.json").read_text())
    assert results["images_seen"] == 600
    assert (tmp_path / "tiny" / "README.md").is_file()
    before, after = weights(SHIPPED_MODEL), weights(tmp_path / "tiny")
    assert before.keys() == after.keys()
    assert not same(before, after)
