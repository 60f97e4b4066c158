"""The log of a training: losses and evaluations, in `training_log.jsonl` and in trackers."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .checkpoints import TrainerState

MAJORITY_ACCURACY = "majority_accuracy_sigma_"
"""Beginning of the names of accuracies; the noise level follows."""


def describe_figures(figures: dict[str, float]) -> str:
    """The figures of an evaluation in one line: accuracies as percentages."""
    levels = {name.removeprefix(MAJORITY_ACCURACY): value for name, value in figures.items()}
    if not all(name.startswith(MAJORITY_ACCURACY) for name in figures):
        return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    return "accuracy " + ", ".join(f"{value:.1%} at sigma {sigma}" for sigma, value in levels.items())


def describe_training(results: dict[str, Any], output_dir: str) -> str:
    """What a user wants to read after a training, from its results as in `results/training.json`."""
    text = f"Trained {results['steps']:,} steps in {results['seconds']:.0f} s; loss {results['final_loss']:.3f}"
    if results["evaluation"]:
        text += f"; {describe_figures(results['evaluation'])}"
        if "eval_draws" in results["settings"]:
            settings = results["settings"]
            text += f" (majority of {settings['eval_draws']} noisy copies, split {settings['eval_split']!r})"
    elif "eval_split" in results["settings"]:
        text += "; --eval_split would tell its accuracy"
    return f"{text}.\nWrote the model, its card and results/training.json to {output_dir}."


class TrainingLog:
    """Lines of `training_log.jsonl`, and the losses that are not logged yet. Both are part of a checkpoint."""

    def __init__(self, output_dir: Path, accelerator: Accelerator):
        self.path, self.accelerator = output_dir / "training_log.jsonl", accelerator
        self.losses: list[torch.Tensor] = []
        self.rows: list[dict[str, Any]] = []

    def start(self, settings: dict[str, Any]) -> None:
        """Start the file with the lines of the checkpoint (lines after it are logged again), and start the trackers."""
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        tracked = {
            key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()
        }
        # without a name, trackers invent one; a resumed training continues its curves
        name = self.path.parent.absolute().name
        names = {"trackio": {"name": name, "resume": "allow"}, "wandb": {"name": name}}
        self.accelerator.init_trackers("hf-smoothing", tracked, init_kwargs=names)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.rows = list(state["losses"]), list(state["rows"])

    def average_losses(self) -> None:
        """Replace the losses of this process by the means over all processes."""
        if self.losses:
            # losses from before a checkpoint are means already, and may be on another device
            losses = torch.stack([loss.to(self.accelerator.device) for loss in self.losses])
            self.losses = list(self.accelerator.reduce(losses, "mean").cpu())

    def check_finite(self, state: TrainerState, model: nn.Module | None = None) -> None:
        """
        Check the losses that are not logged yet, and the weights of `model`, before they replace those saved before.

        Raises:
            FloatingPointError: if a loss or a weight is not finite.
        """
        self.average_losses()
        tensors = [*self.losses, *(() if model is None else model.parameters())]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise FloatingPointError(
                f"Loss or weights are no longer finite by step {state.step}: start again with a lower learning rate, or "
                "resume from the last checkpoint if it is older."
            )

    def write_loss(self, state: TrainerState, learning_rate: float) -> float:
        """Log the mean of the losses since the last call, and return it; see [`check_finite`] for the error."""
        self.check_finite(state)
        loss = float(torch.stack(self.losses).mean())
        self.losses = []
        self.write(state, "loss", loss, learning_rate=learning_rate)
        return loss

    def write(self, state: TrainerState, name: str, value: Any, **more: float) -> None:
        """Log a value: in the file under its name, in the trackers each entry of a dict by itself."""
        self.rows.append({"step": state.step, "epoch": state.epoch, name: value, **more})
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        self.accelerator.log({**(value if isinstance(value, dict) else {name: value}), **more}, step=state.step)

    def last(self, name: str) -> Any:
        """The last value logged under a name; `None` if there is none."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)
