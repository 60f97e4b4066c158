"""Checkpoints: saving the state of a training, and finding the checkpoint to resume from."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..utils.files import write_json

LATEST = "latest"

_PREFIX = "step_"


@dataclass
class TrainerState:
    """How far a training is: finished updates, the current epoch, its batches that each process has used, and seconds."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, fixed_settings: dict[str, Any]) -> None:
    """
    Save everything that resuming needs, in place of the checkpoint before. An interrupted save leaves the old one.

    The checkpoint is named by its number of finished updates; [`find_checkpoint`] compares its `fixed_settings`.
    """
    folder, unfinished = output_dir / f"{_PREFIX}{step}", output_dir / "unfinished-checkpoint"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(fixed_settings, unfinished / "settings.json")
        outdated = [checkpoint for checkpoint in _list_checkpoints(output_dir) if checkpoint != folder]
        if folder.exists():  # of a training that was resumed from an earlier checkpoint
            shutil.rmtree(folder)
        unfinished.rename(folder)
        for checkpoint in outdated:
            shutil.rmtree(checkpoint)
    accelerator.wait_for_everyone()


def find_checkpoint(output_dir: Path, requested: str | None, fixed_settings: dict[str, Any]) -> Path | None:
    """
    The checkpoint to resume from.

    Args:
        output_dir: folder of the training.
        requested: `None` for a new training, `latest`, or the folder of a checkpoint.
        fixed_settings: settings that must equal those of the checkpoint.

    Returns:
        The checkpoint's folder; `None` where a new training starts.

    Raises:
        ValueError: as [`locate_checkpoint`]; for a checkpoint with other settings.
    """
    checkpoint = locate_checkpoint(output_dir, requested)
    if checkpoint is None:
        return None
    saved_settings = json.loads((checkpoint / "settings.json").read_text())
    if differences := _list_differences(saved_settings, fixed_settings):
        raise ValueError(
            f"{checkpoint} belongs to a training with other settings ({'; '.join(differences)}): use the same settings, or "
            "start a new training."
        )
    return checkpoint


def locate_checkpoint(output_dir: Path, requested: str | None) -> Path | None:
    """
    The checkpoint to resume from, as [`find_checkpoint`], whatever its settings: for a check before anything is loaded.

    Raises:
        ValueError: for a folder that holds a training already, or a missing checkpoint.
    """
    checkpoints = _list_checkpoints(output_dir)
    if requested is None:
        if checkpoints or (output_dir / "model.safetensors").exists():
            raise ValueError(
                f"{output_dir} holds a training: resume it (--resume_from_checkpoint {LATEST}), or choose another folder."
            )
        return None
    if requested == LATEST:
        if not checkpoints:
            if (output_dir / "results" / "training.json").exists():
                raise ValueError(f"{output_dir} holds a finished model and no checkpoint: choose another folder.")
            return None
        return checkpoints[-1]
    checkpoint = Path(requested)
    if not (checkpoint / "settings.json").is_file():
        existing = ", ".join(map(str, checkpoints)) or "none"
        raise ValueError(f"There is no checkpoint at {requested!r}; {output_dir} has: {existing}.")
    return checkpoint


def _list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    checkpoints = [path for path in output_dir.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(checkpoints, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _list_differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ; of nested settings, such as a config, only the differing fields."""
    differences = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += _list_differences(old, new, f"{prefix}{name}.")
        elif old != new:
            differences.append(f"{prefix}{name}: {old!r} -> {new!r}")
    return differences
