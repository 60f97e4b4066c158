"""The training loop, on Accelerate. Pretraining, finetuning and the count head share it.

What is random in a step (order, augmentation, noise, dropped paths) depends only on the seed and the number of the step. So
a training that was killed and resumed from its last checkpoint ends with the weights of one that was never interrupted.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from transformers import get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg

from ..core.progress_bar import open_bar
from ..core.validation import check_count
from ..utils.processes import start_processes
from .batches import Batch, Batches, move_to_device
from .checkpoints import LATEST, TrainerState, find_checkpoint, locate_checkpoint, save_checkpoint
from .muon import MuonAdamW
from .parameter_groups import group_parameters
from .seeds import seed_everything
from .training_log import TrainingLog, describe_figures

_MAY_CHANGE = frozenset(
    ("output_dir", "num_train_epochs", "max_train_steps", "checkpointing_steps", "resume_from_checkpoint", "report_to")
)
"""Settings that a resumed training may change, as long as the number of steps stays the same."""


@dataclass
class TrainingSettings:
    """
    How a model is trained.

    Raises:
        ValueError: for a setting out of range.
    """

    output_dir: str = HfArg(help="new folder for the model, its checkpoints and its log")
    num_train_epochs: int = HfArg(default=10, help="passes over the images")
    max_train_steps: int | None = HfArg(default=None, help="number of updates, in place of epochs; a stream needs it")
    per_device_train_batch_size: int = HfArg(default=128, help="images per batch and process")
    gradient_accumulation_steps: int = HfArg(default=1, help="batches per update")
    learning_rate: float = HfArg(default=1.5e-3, help="peak learning rate of AdamW")
    muon_learning_rate: float = HfArg(
        default=0.0, help="peak learning rate of Muon, for the encoder's matrices; 0.03 suits, 0: AdamW for them too"
    )
    weight_decay: float = HfArg(default=0.05, help="weight decay; not for biases, norms and position embeddings")
    warmup_ratio: float = HfArg(default=0.05, help="share of the updates with a rising learning rate; then cosine")
    layer_decay: float = HfArg(default=1.0, help="learning rate of each layer, divided by that of the next layer")
    max_grad_norm: float = HfArg(default=1.0, help="clip gradients to this norm")
    ema_decay: float = HfArg(default=0.0, help="decay of a moving average of the weights, which is saved; 0: none")
    seed: int = HfArg(default=0, help="seed of everything random")
    mixed_precision: str | None = HfArg(default=None, help="no, bf16 or fp16 (default: that of `accelerate launch`)")
    torch_compile: bool = HfArg(default=False, help="compile the model: starts slowly, then runs faster")
    checkpointing_steps: str = HfArg(
        default="epoch", help="save a checkpoint after this number of updates, or after every `epoch`"
    )
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="resume from this folder; `latest`: from the last checkpoint in output_dir, if there is one"
    )
    logging_steps: int = HfArg(default=50, help="log the mean loss after this number of updates")
    report_to: str | None = HfArg(
        default=None, help="tracker such as trackio, tensorboard or wandb; all: every installed one"
    )

    def __post_init__(self) -> None:
        counts = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps")
        for name in counts:
            check_count(name, getattr(self, name))
        if self.max_train_steps is not None:
            check_count("max_train_steps", self.max_train_steps)
        steps = self.checkpointing_steps
        if steps != "epoch" and not (steps.isdecimal() and int(steps) > 0):
            raise ValueError(f"checkpointing_steps={steps!r} must be a number of steps, or epoch.")
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r} is unknown: use no, bf16 or fp16.")
        for name, valid, allowed in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("muon_learning_rate", 0 <= self.muon_learning_rate < math.inf, "0 or above"),
            ("max_grad_norm", 0 < self.max_grad_norm < math.inf, "above 0"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "0 or above, and below 1"),
            ("ema_decay", 0 <= self.ema_decay < 1, "0 or above, and below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or above"),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0, and at most 1"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}.")

    def create_accelerator(self) -> Accelerator:
        """Connect to the processes that were launched. Raises a `ValueError` as [`locate_checkpoint`]."""
        locate_checkpoint(Path(self.output_dir), self.resume_from_checkpoint)
        return start_processes(
            mixed_precision=self.mixed_precision,
            dynamo_backend="inductor" if self.torch_compile else None,
            log_with=self.report_to,
            project_dir=self.output_dir,
        )


class TrainingLoop:
    """
    Trains a model, or resumes its training from a checkpoint.

    `output_dir/training_log.jsonl` gets a line for every mean loss and every evaluation; `output_dir/step_N` is the last
    checkpoint. After each epoch the model (with `ema_decay`, the EMA of its weights) is evaluated and saved to `output_dir`,
    so an interrupted training leaves a usable model too.

    Args:
        model: a mixed-noise ViT, or another model (see [`group_parameters`]).
        batches: the training data.
        compute_loss: computes a loss from the model (as wrapped for its processes) and the inputs and targets of a batch. It
            may use the global random generators, which are seeded for each batch.
        settings: how to train.
        accelerator: the processes, from `settings.create_accelerator()`.
        processor: image processor to save with the model.
        fixed_settings: further settings that must stay the same when the training is resumed, as plain values.
        evaluate: computes figures to log from the model that is then saved; called on all processes.
        finish: makes the model that is evaluated and saved from the trained one, which it leaves as it is.

    Raises:
        ValueError: for a missing checkpoint or one of a training with other settings, a folder that holds a training
            already, or a stream without `max_train_steps`.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        compute_loss: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor],
        settings: TrainingSettings,
        accelerator: Accelerator,
        *,
        fixed_settings: dict[str, Any],
        processor: Any = None,
        evaluate: Callable[[Any], dict[str, float]] | None = None,
        finish: Callable[[Any], Any] | None = None,
    ):
        self.batches, self.compute_loss, self.evaluate, self.processor = batches, compute_loss, evaluate, processor
        self.finish = finish
        self.settings, self.accelerator, self.output_dir = settings, accelerator, Path(settings.output_dir)
        self.num_steps = _count_steps(settings, batches)
        all_settings = {
            **{name: value for name, value in asdict(settings).items() if name not in _MAY_CHANGE},
            "mixed_precision": accelerator.mixed_precision,
            **fixed_settings,
            "steps": self.num_steps,
            "num_processes": accelerator.num_processes,
        }
        self.fixed_settings = json.loads(json.dumps(all_settings))  # as a checkpoint gives them back
        checkpoint = find_checkpoint(self.output_dir, settings.resume_from_checkpoint, self.fixed_settings)
        self._set_up(model)
        if checkpoint is not None:
            accelerator.load_state(str(checkpoint))
        self.log.start({**asdict(settings), **self.fixed_settings})
        self.last_saved_step = self.state.step

    def _set_up(self, model: Any) -> None:
        """Create everything that training changes, and register it for checkpoints."""
        settings, accelerator = self.settings, self.accelerator
        model = model.to(memory_format=torch.channels_last)
        learning_rates = (
            settings.learning_rate,
            settings.weight_decay,
            settings.layer_decay,
            settings.muon_learning_rate,
        )
        optimizer: Any = MuonAdamW(group_parameters(model, *learning_rates))
        num_warmup_steps = math.ceil(settings.warmup_ratio * self.num_steps)
        # not prepared: a prepared scheduler takes one step per process in each update
        self.scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps, self.num_steps)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.unwrapped_model = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        decay = settings.ema_decay
        self.ema = ModelEmaV3(self.unwrapped_model, decay, use_warmup=True) if decay else None
        self.final_model = self.unwrapped_model if self.ema is None else self.ema.module
        self.state, self.log = TrainerState(), TrainingLog(self.output_dir, accelerator)
        averages = [] if self.ema is None else [self.ema]
        accelerator.register_for_checkpointing(self.state, self.scheduler, self.log, *averages)

    def run(self) -> dict[str, Any]:
        """
        Train until the last step.

        Returns:
            Results as plain values: steps, images seen, final loss, seconds, evaluation and the like.

        Raises:
            ValueError: for a stream with fewer images than one update takes.
            FloatingPointError: if loss or weights are no longer finite.
            KeyboardInterrupt: on the user's, with a message that says how to resume.
        """
        main, total, done = self.accelerator.is_main_process, self.num_steps, self.state.step
        with open_bar(desc="training", total=total, initial=done, unit="step", disable=not main) as progress_bar:
            self.started = time.monotonic() - self.state.seconds
            try:
                while self.state.step < self.num_steps:
                    self._train_epoch(progress_bar)
                    self._finish_epoch(progress_bar)
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(self._describe_stop()) from error
        batches_per_step = self.settings.gradient_accumulation_steps * self.accelerator.num_processes
        return {
            "steps": self.num_steps,
            "images_seen": self.num_steps * batches_per_step * self.batches.batch_size,
            "final_loss": self.log.last("loss"),
            "evaluation": self.log.last("evaluation"),
            "seconds": self.state.seconds,
            "device": str(self.accelerator.device),
            "num_processes": self.accelerator.num_processes,
            "num_threads": torch.get_num_threads(),
            "parameters": sum(parameter.numel() for parameter in self.unwrapped_model.parameters()),
        }

    def _describe_stop(self) -> str:
        stopped = f"stopped at step {self.state.step} of {self.num_steps}"
        if not self.last_saved_step:
            return f"{stopped}; there is no checkpoint yet, so the same command starts again"
        return (
            f"{stopped}; the last checkpoint is of step {self.last_saved_step}: the same command with "
            f"`--resume_from_checkpoint {LATEST}` resumes from it"
        )

    def _train_epoch(self, progress_bar: Any) -> None:
        """The updates of the current epoch, from the current batch on."""
        settings, state = self.settings, self.state
        _set_training_mode(self.model)
        batches = self.batches.epoch(state.epoch, state.batch)
        size = settings.gradient_accumulation_steps
        while state.step < self.num_steps and len(update := list(islice(batches, size))) == size:
            self._update(update)
            progress_bar.update()
            if state.step % settings.logging_steps == 0 or state.step == self.num_steps:
                loss = self.log.write_loss(state, self.scheduler.get_last_lr()[-1])
                progress_bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            due = settings.checkpointing_steps != "epoch" and state.step % int(settings.checkpointing_steps) == 0
            # the last checkpoint follows the model, so that resuming from it finds the model saved
            if due and state.step < self.num_steps:
                self.log.check_finite(state, self.final_model)
                self._save_checkpoint()
        if state.batch == 0:
            raise ValueError("The stream holds fewer images than one update takes.")

    def _update(self, batches: list[Batch]) -> None:
        """One step of the optimizer, with the accumulated gradients of some batches."""
        for number, (inputs, targets) in enumerate(batches, 1):
            self.state.batch += 1
            seed_everything(self.settings.seed, self.state.epoch, self.state.batch, self.accelerator.process_index)
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(self.model):
                inputs, targets = (move_to_device(tensor, self.accelerator.device) for tensor in (inputs, targets))
                loss = self.compute_loss(self.model, inputs, targets)
                self.accelerator.backward(loss / len(batches))
            self.log.losses.append(loss.detach())
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.state.step += 1
        self.state.seconds = time.monotonic() - self.started
        if self.ema is not None:
            self.ema.update(self.unwrapped_model, self.state.step)

    def _finish_epoch(self, progress_bar: Any) -> None:
        """Evaluate and save the model, and save a checkpoint where one is due."""
        state = self.state
        self.log.check_finite(state, self.final_model)
        model = self.final_model if self.finish is None else self.finish(self.final_model)
        if self.evaluate is not None:
            model.eval()
            figures = self.evaluate(model)
            self.log.write(state, "evaluation", figures)
            if self.accelerator.is_main_process:
                progress_bar.write(f"epoch {state.epoch + 1}: {describe_figures(figures)}")
        if self.accelerator.is_main_process:
            for saved in (model, self.processor):
                if saved is not None:
                    saved.save_pretrained(self.output_dir)
        finished = state.step == self.num_steps
        if not finished:
            state.epoch, state.batch = state.epoch + 1, 0
        if (finished or self.settings.checkpointing_steps == "epoch") and self.last_saved_step < state.step:
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        self.log.average_losses()
        save_checkpoint(self.accelerator, self.output_dir, self.state.step, self.fixed_settings)
        self.last_saved_step = self.state.step


def _count_steps(settings: TrainingSettings, batches: Batches) -> int:
    if batches.total is None:
        if settings.max_train_steps is None:
            raise ValueError("The length of a stream is unknown: set max_train_steps.")
        return settings.max_train_steps
    updates = len(batches) // settings.gradient_accumulation_steps
    if updates == 0:
        size = settings.gradient_accumulation_steps
        raise ValueError(f"{len(batches)} batches make no update with gradient_accumulation_steps={size}.")
    return settings.max_train_steps or settings.num_train_epochs * updates


def _set_training_mode(model: nn.Module) -> None:
    """Training mode, except for frozen modules: dropped paths and batch statistics would change their features."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
