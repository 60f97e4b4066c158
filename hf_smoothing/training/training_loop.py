"""The one training loop, on Accelerate: pretraining, finetuning and the count head share it.

Whatever is random in a step (order, augmentation, noise, dropped paths) depends on the seed and the step's number alone, so
that a training which was killed and goes on from its last checkpoint ends with the weights it would have had.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg

from ..core.validation import check_count
from ..utils.processes import start_processes
from .checkpoints import Log, Position, find_checkpoint, save_checkpoint
from .training_images import Batch, seed_all

_FREE = frozenset(
    ("output_dir", "num_train_epochs", "max_train_steps", "checkpointing_steps", "resume_from_checkpoint", "report_to")
)
"""Settings that may change where a training goes on; the number of steps that they come to may not."""


@dataclass
class TrainingSettings:
    """
    How a model is trained.

    Raises:
        ValueError: for a setting out of range.
    """

    output_dir: str = HfArg(help="a new folder; it becomes the model's")
    num_train_epochs: int = HfArg(default=10, help="passes over the images")
    max_train_steps: int | None = HfArg(default=None, help="overrides num_train_epochs; needed for a stream")
    per_device_train_batch_size: int = HfArg(default=128, help="images in a batch of one process")
    gradient_accumulation_steps: int = HfArg(default=1, help="batches an update")
    learning_rate: float = HfArg(default=1.5e-3, help="peak learning rate of AdamW")
    weight_decay: float = HfArg(default=0.05, help="weight decay; not of biases, norms and position embeddings")
    warmup_ratio: float = HfArg(
        default=0.05, help="share of the steps in which the learning rate rises; then a cosine"
    )
    layer_decay: float = HfArg(default=1.0, help="factor of the learning rate from each layer to the one before it")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm")
    ema_decay: float = HfArg(default=0.0, help="average the weights with this decay and save the average; 0: do not")
    seed: int = HfArg(default=0, help="of everything that is random")
    mixed_precision: str | None = HfArg(
        default=None, help="no, bf16 or fp16; by default what `accelerate launch` was told"
    )
    torch_compile: bool = HfArg(default=False, help="compile the model: slow to start, faster later")
    checkpointing_steps: str = HfArg(default="epoch", help="a checkpoint every this many steps, or every epoch")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="go on from this checkpoint; `latest`: from the last one in output_dir, if there is one"
    )
    logging_steps: int = HfArg(default=50, help="log the mean loss every this many steps")
    report_to: str | None = HfArg(
        default=None, help="tracker: tensorboard, wandb, ... (whichever is installed), or all"
    )

    def __post_init__(self) -> None:
        for name in (
            "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"
        ):  # fmt: skip
            check_count(name, getattr(self, name))
        if self.max_train_steps is not None:
            check_count("max_train_steps", self.max_train_steps)
        if self.checkpointing_steps != "epoch":
            if not self.checkpointing_steps.isdecimal():
                raise ValueError(
                    f"checkpointing_steps={self.checkpointing_steps!r} must be a number of steps, or epoch."
                )
            check_count("checkpointing_steps", int(self.checkpointing_steps))
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r} is unknown: use no, bf16 or fp16.")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        for name in ("warmup_ratio", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or above, and below 1.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be 0 or above.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} must be above 0, and at most 1.")

    def start(self) -> Accelerator:
        """The processes that were launched."""
        return start_processes(
            mixed_precision=self.mixed_precision,
            dynamo_backend="inductor" if self.torch_compile else None,
            log_with=self.report_to,
            project_dir=self.output_dir,
        )


class Batches(Protocol):
    """
    What a model is trained on.

    Attributes:
        batch_size: rows in a batch of one process.
        total: rows in all; `None` for a stream.
    """

    batch_size: int
    total: int | None

    def __len__(self) -> int:
        """Batches an epoch, on each process; not asked of a stream."""
        ...

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Inputs and targets of an epoch, from batch `first` on; the same whenever they are asked for."""
        ...


def parameter_groups(
    model: Any, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """
    Groups of parameters for AdamW: one-dimensional ones and position embeddings do not decay, and each layer of the encoder
    learns by `layer_decay` slower than the next (timm's grouping; Bao et al. 2021, BEiT). Frozen ones are left out.

    Args:
        model: a mixed-noise ViT; any other, whose layers nobody knows here, for a `layer_decay` of 1 alone.
        learning_rate: that of the last layer and of what comes after it.
        weight_decay: of those that decay.
        layer_decay: at most 1.

    Raises:
        ValueError: for a layer decay of another model.
    """
    groups, inside = [], set()
    if hasattr(model, "mixed_noise_vit"):
        encoder = model.mixed_noise_vit.encoder
        groups = param_groups_layer_decay(
            encoder, weight_decay, no_weight_decay_list=encoder.no_weight_decay(), layer_decay=layer_decay
        )
        inside = {id(parameter) for parameter in encoder.parameters()}
    elif layer_decay < 1:
        raise ValueError(f"layer_decay={layer_decay:g} takes a mixed-noise ViT: for other models leave it out.")
    rest = [one for one in model.parameters() if id(one) not in inside and one.requires_grad]
    for decay, parameters in (
        (weight_decay, [one for one in rest if one.ndim > 1]),
        (0.0, [one for one in rest if one.ndim <= 1]),
    ):
        if parameters:
            groups.append({"params": parameters, "weight_decay": decay, "lr_scale": 1.0})
    return [{**one, "lr": learning_rate * one.pop("lr_scale")} for one in groups]


def train(
    model: Any,
    batches: Batches,
    compute_loss: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor],
    settings: TrainingSettings,
    accelerator: Accelerator,
    *,
    save: Callable[[Any], None],
    identity: dict[str, Any],
    evaluate: Callable[[Any], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """
    Train a model; go on where a checkpoint left off.

    `output_dir/training_log.jsonl` gets a line for every mean loss and every evaluation, `output_dir/step_N` is the last
    checkpoint. After each epoch the model is evaluated and saved, so that a training cut short leaves one.

    Args:
        model: see [`parameter_groups`] for which.
        batches: what it sees.
        compute_loss: from the model (in the wrapping of its processes) and a batch's inputs and targets to a loss. The
            global generators it may draw from are seeded for each batch.
        settings: how to train.
        accelerator: the processes, from `settings.start()`.
        save: saves the model (the averaged one, with `ema_decay`); called on the main process.
        identity: further settings that must be the same for a training to be gone on with, as plain values.
        evaluate: called on all processes with the model that would be saved; its numbers are logged.

    Returns:
        What came of it, as plain values: steps, images seen, final loss, seconds, evaluations.

    Raises:
        ValueError: for a checkpoint that is not there or of a training with other settings, a folder that holds a training
            already, a stream without `max_train_steps`.
        FloatingPointError: where the loss is not finite.
    """
    output_dir, together = Path(settings.output_dir), settings.gradient_accumulation_steps
    steps = _number_of_steps(settings, batches)
    deciding = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    deciding["mixed_precision"] = accelerator.mixed_precision
    identity = {**deciding, **identity, "steps": steps, "num_processes": accelerator.num_processes}
    identity = json.loads(json.dumps(identity))
    checkpoint = find_checkpoint(output_dir, settings.resume_from_checkpoint, identity)

    model = model.to(memory_format=torch.channels_last)
    optimizer: Any = torch.optim.AdamW(
        parameter_groups(model, settings.learning_rate, settings.weight_decay, settings.layer_decay)
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(settings.warmup_ratio * steps), steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    average = ModelEmaV3(plain, settings.ema_decay, use_warmup=True) if settings.ema_decay else None
    final = plain if average is None else average.module
    position, log = Position(), Log(output_dir, accelerator)
    # the scheduler is not prepared: that would make it take as many steps at once as there are processes
    accelerator.register_for_checkpointing(position, scheduler, log, *([average] if average else []))
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
    log.open(position, {**asdict(settings), **identity})

    began = time.monotonic() - position.seconds
    saved_at = position.step
    bar = tqdm(
        desc="training", total=steps, initial=position.step, unit="step", disable=not accelerator.is_main_process
    )
    while position.step < steps:
        _set_training(model)
        epoch = batches.epoch(position.epoch, position.batch)
        while position.step < steps and len(update := list(islice(epoch, together))) == together:
            for number, (inputs, targets) in enumerate(update, 1):
                position.batch += 1
                seed_all(settings.seed, position.epoch, position.batch, accelerator.process_index)
                with nullcontext() if number == together else accelerator.no_sync(model):
                    inputs, targets = (one.to(accelerator.device, non_blocking=True) for one in (inputs, targets))
                    loss = compute_loss(model, inputs, targets)
                    accelerator.backward(loss / together)
                log.losses.append(loss.detach())
            accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            position.step += 1
            position.seconds = time.monotonic() - began
            bar.update()
            if average is not None:
                average.update(plain, position.step)
            if position.step % settings.logging_steps == 0 or position.step == steps:
                bar.set_postfix(loss=f"{log.write_loss(position, scheduler.get_last_lr()[-1]):.3f}")
            due = settings.checkpointing_steps != "epoch" and position.step % int(settings.checkpointing_steps) == 0
            if due and position.step < steps:  # the last one follows the model: who goes on from it finds that saved
                log.refuse_infinite(position, final)
                saved_at = save_checkpoint(accelerator, output_dir, position, log, identity)
        if position.batch == 0:
            raise ValueError("The stream holds fewer images than one update takes.")
        log.refuse_infinite(position, final)
        if evaluate is not None:
            final.eval()
            log.write(position, "evaluation", evaluate(final))
        if accelerator.is_main_process:  # every epoch: a training that is cut short leaves a usable model
            save(final)
        if position.step < steps:
            position.epoch, position.batch = position.epoch + 1, 0
        if (settings.checkpointing_steps == "epoch" or position.step == steps) and saved_at < position.step:
            saved_at = save_checkpoint(accelerator, output_dir, position, log, identity)
    bar.close()
    return {
        "steps": steps,
        "images_seen": steps * together * batches.batch_size * accelerator.num_processes,
        "final_loss": log.last("loss"),
        "evaluation": log.last("evaluation"),
        "seconds": position.seconds,
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
    }


def _number_of_steps(settings: TrainingSettings, batches: Batches) -> int:
    if batches.total is None:
        if settings.max_train_steps is None:
            raise ValueError("A stream does not say how long an epoch is: set max_train_steps.")
        return settings.max_train_steps
    updates = len(batches) // settings.gradient_accumulation_steps
    if updates == 0:
        raise ValueError(
            f"{len(batches)} batches make no update with gradient_accumulation_steps="
            f"{settings.gradient_accumulation_steps}."
        )
    return settings.max_train_steps or settings.num_train_epochs * updates


def _set_training(model: nn.Module) -> None:
    """Training mode, except for what is frozen: dropped paths and batch statistics would change its features."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
