"""What a training keeps in its folder: its log, and the checkpoints from which it goes on."""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..utils.files import write_json

LATEST = "latest"

_CHECKPOINT = "step_"


@dataclass
class Position:
    """Where a training is: part of a checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch, on each process
    seconds: float = 0.0  # spent on all steps so far

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Log:
    """
    Lines of `training_log.jsonl`, and the losses since the last of them (part of a checkpoint).

    Args:
        output_dir: the training's folder.
        accelerator: the processes and their trackers.
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator):
        self.path, self.accelerator = output_dir / "training_log.jsonl", accelerator
        self.losses: list[torch.Tensor] = []
        self.rows: list[dict[str, Any]] = []

    def open(self, position: Position, settings: dict[str, Any]) -> None:
        """Begin the log, or go on with it: what was logged after the checkpoint will be logged again."""
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        plain = {
            name: value if isinstance(value, (int, float, str)) else str(value) for name, value in settings.items()
        }
        self.accelerator.init_trackers("hf-smoothing", plain)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.rows = list(state["losses"]), list(state["rows"])

    def share(self) -> None:
        """The losses of this process become the means over all processes."""
        if self.losses:
            # those of before a checkpoint are shared already, and may lie elsewhere
            together = torch.stack([one.to(self.accelerator.device) for one in self.losses])
            self.losses = list(self.accelerator.reduce(together, "mean").cpu())

    def refuse_infinite(self, position: Position, model: nn.Module) -> None:
        """Raise a `FloatingPointError` where there is nothing worth saving: in place of what was saved before, that is."""
        self.share()
        finite = all(math.isfinite(float(one)) for one in self.losses)
        if not finite or not all(bool(one.isfinite().all()) for one in model.parameters()):
            raise FloatingPointError(
                f"Loss or weights are no longer finite by step {position.step}: lower the learning rate and start anew, or "
                "go on from the last checkpoint if that is of before."
            )

    def write_loss(self, position: Position, learning_rate: float) -> float:
        """Log the mean loss since the last time, and return it."""
        self.share()
        loss = float(torch.stack(self.losses).mean())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} by step {position.step}: lower the learning rate, or go on from the last checkpoint."
            )
        self.losses = []
        self.write(position, "loss", loss, learning_rate=learning_rate)
        return loss

    def write(self, position: Position, name: str, value: Any, **more: float) -> None:
        self.rows.append({"step": position.step, "epoch": position.epoch, name: value, **more})
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        self.accelerator.log({**(value if isinstance(value, dict) else {name: value}), **more}, step=position.step)

    def last(self, name: str) -> Any:
        return next((row[name] for row in reversed(self.rows) if name in row), None)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, position: Position, log: Log, identity: dict[str, Any]
) -> int:
    """Save everything it takes to go on, in place of the checkpoint before; whole or not at all. Returns the step."""
    log.share()
    folder, unfinished = output_dir / f"{_CHECKPOINT}{position.step}", output_dir / "unfinished-checkpoint"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(identity, unfinished / "settings.json")
        before = [one for one in _checkpoints(output_dir) if one != folder]
        if folder.exists():  # of a training that went on from an earlier checkpoint
            shutil.rmtree(folder)
        unfinished.rename(folder)
        for one in before:
            shutil.rmtree(one)
    accelerator.wait_for_everyone()
    return position.step


def _checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    found = [one for one in output_dir.glob(f"{_CHECKPOINT}*") if one.name.removeprefix(_CHECKPOINT).isdecimal()]
    return sorted(found, key=lambda one: int(one.name.removeprefix(_CHECKPOINT)))


def _differences(before: dict[str, Any], now: dict[str, Any], within: str = "") -> list[str]:
    """Settings that are not what they were, by name; of nested ones, such as a config's, no more than those that differ."""
    found = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{within}{name}.")
        elif old != new:
            found.append(f"{within}{name}: {old!r} -> {new!r}")
    return found


def find_checkpoint(output_dir: Path, asked: str | None, identity: dict[str, Any]) -> Path | None:
    there = _checkpoints(output_dir)
    if asked is None:
        if there or (output_dir / "model.safetensors").exists():
            raise ValueError(
                f"{output_dir} holds a training: go on with it (--resume_from_checkpoint {LATEST}), or choose another "
                "folder."
            )
        return None
    if asked == LATEST:
        if not there:
            if (output_dir / "results" / "training.json").exists():
                raise ValueError(f"{output_dir} holds a finished model and no checkpoint: choose another folder.")
            return None
        found = there[-1]
    else:
        found = Path(asked)
        if not (found / "settings.json").is_file():
            raise ValueError(
                f"There is no checkpoint at {asked!r}; {output_dir} has: {', '.join(map(str, there)) or 'none'}."
            )
    before = json.loads((found / "settings.json").read_text())
    differing = _differences(before, identity)
    if differing:
        raise ValueError(
            f"{found} is of a training with other settings ({'; '.join(differing)}): go on with those, or start a new one."
        )
    return found
