"""Certifying a whole dataset: by any number of processes, resumable, with one record an image.

Processes take images one at a time from a counter that they share, so that none idles while there is work, however much
the images differ in cost. Every image's noise depends on the seed and its pixels alone, so it does not matter which
process takes it, when, or beside which others.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..core.calibration import Calibration
from ..core.certificates import Rule
from ..core.count_predictor import CountPredictor, read_calibration
from ..core.loading import loading, weights_digest
from ..core.noise import GaussianNoise
from ..core.preprocessing import NoiseResolution
from ..core.rules import SurrogateRule, make_rule
from ..core.smoothing import SmoothedClassifier
from ..core.validation import check_count
from ..data.labelled_images import LabelledImages
from ..utils.processes import on_main_first
from .progress import Progress
from .records import (
    Record,
    ShardWriter,
    count_records,
    error_record,
    record,
)
from .run_folder import Plan, RunSummary, check_folder, is_right, merge, prepare, session_of
from .work_queue import WorkQueue

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
"""Types of the forward passes by name, as the engine takes them: float32 weights, under autocast or not."""


@dataclass(frozen=True)
class RunSettings:
    """
    What decides the records of a run. A run is gone on with only under the same settings.

    Args:
        model_name_or_path: an image classifier on the Hub or in a local folder.
        dataset_name: what `load_dataset` takes (a name on the Hub, a local folder), or a Parquet file.
        sigmas: noise levels, in `[0, 1]` pixels.
        dataset_config_name: configuration of the dataset.
        split: its split.
        revision: revision of the model.
        image_column: column of the images; found if it has a usual name.
        label_column: column of the labels; found if it has a usual name.
        every: take the images whose index in the split is a multiple of this.
        max_samples: take at most this many images.
        radii: radii to decide (`surrogate`: with `delta`); `None` finds the radius of each image.
        method: `sequential`, `fixed`, `surrogate` or `counts`, see [`make_rule`].
        count_head: a count head on the Hub or in a local folder: `surrogate` asks it alone, `sequential` draws less with it.
        noise_resolution: where noise is added: `input`, `native`, or pixels a side.
        denoiser: name of a denoiser in front of the model.
        delta: share of the images about which a calibrated count head may be wrong, `surrogate` only.
        alpha: probability that a certificate is wrong.
        max_draws: the most draws for one image.
        n0, n: draws of the `fixed` method.
        tolerance: relative tolerance of the radius, `sequential` without radii.
        seed: seed of the noise, from 0 to 2**63 - 1.
        dtype: `float32`, or `bfloat16` (autocast).

    Raises:
        ValueError: for a setting out of range.
    """

    model_name_or_path: str
    dataset_name: str
    sigmas: tuple[float, ...]
    dataset_config_name: str | None = None
    split: str = "test"
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    every: int = 1
    max_samples: int | None = None
    radii: tuple[float, ...] | None = None
    method: str = "sequential"
    alpha: float = 0.001
    max_draws: int | None = None
    n0: int | None = None
    n: int | None = None
    tolerance: float | None = None
    seed: int = 0
    dtype: str = "float32"
    count_head: str | None = None
    delta: float | None = None
    noise_resolution: NoiseResolution = "input"
    denoiser: str | None = None

    def __post_init__(self) -> None:
        check_count("every", self.every)
        if self.max_samples is not None:
            check_count("max_samples", self.max_samples)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown: use {' or '.join(DTYPES)}.")
        if self.method == "surrogate" and self.count_head is None:
            raise ValueError("method='surrogate' takes a count head: pass count_head.")
        if self.count_head is not None and self.method not in ("surrogate", "sequential"):
            raise ValueError(
                f"count_head={self.count_head!r} has no meaning for method {self.method!r}: leave it out."
            )
        if not self.sigmas or len(set(self.sigmas)) < len(self.sigmas):
            raise ValueError(f"sigmas={self.sigmas} must be one or more different noise levels.")
        if not 0 <= self.seed < 2**63:  # records hold it as a 64-bit number
            raise ValueError(f"seed={self.seed} must be 0 or above, and below 2**63.")
        reached = {radius for sigma in self.sigmas for radius in self.rule(sigma)[1] or ()}
        if missed := sorted(set(self.radii or ()) - reached):
            self._rule(tuple(missed)).check(GaussianNoise(max(self.sigmas)))  # says how many draws it takes

    @property
    def smallest_radius(self) -> float:
        """The smallest radius asked for; 0 where none is."""
        return min(self.radii or (0.0,))

    def rule(self, sigma: float) -> tuple[Rule, tuple[float, ...] | None]:
        """
        The rule at one sigma, and the radii that it decides: those that the budget can show there. With several sigmas the
        larger radii are for the larger sigmas; deciding them at a smaller one would be an error.
        """
        noise = GaussianNoise(sigma)
        reachable = None if self.radii is None else tuple(one for one in self.radii if self._shows(one, noise))
        rule = self._rule(reachable or self.radii)
        rule.check(noise)
        return rule, reachable

    def _rule(self, radii: tuple[float, ...] | None) -> Rule:
        names = ("alpha", "n0", "n", "tolerance", "delta")
        return make_rule(
            self.method,
            radii=radii,
            max_draws=self.max_draws,
            calibration=self._calibration,
            **{name: getattr(self, name) for name in names},
        )

    @cached_property
    def _calibration(self) -> Calibration | None:
        return read_calibration(self.count_head) if self.count_head and self.delta is not None else None

    def _shows(self, radius: float, noise: GaussianNoise) -> bool:
        rule = self._rule((radius,))
        try:
            rule.check(noise)
        except ValueError:
            return False
        return True


def certify_dataset(
    settings: RunSettings,
    output_dir: str | Path,
    *,
    accelerator: Accelerator,
    batch_size: int = 128,
    streaming: bool = False,
    resume: bool = True,
) -> RunSummary | None:
    """
    Certify the images of a dataset, or go on with it, and merge the records to `output_dir/certificates.parquet`.

    While it runs, every process appends to a shard of its own, `output_dir/shards/records-rank00000.jsonl`; what makes the
    run reproducible is in `output_dir/run.json`. An image whose content is no picture, or that has another shape behind the
    image processor than the first one, gets a record with an `error`.

    Args:
        settings: what decides the records.
        output_dir: an empty or new folder, or that of a run with the same settings, which is gone on with.
        accelerator: the processes, from [`queue.start_processes`].
        batch_size: draws in one forward pass.
        streaming: read the dataset as a stream, once for each sigma, without storing it.
        resume: go on with a run; otherwise the folder must not hold one.

    Returns:
        A summary, on the main process; `None` on the others.

    Raises:
        ValueError: before any work, for settings that make no sense, a model or dataset that cannot be loaded, a column that
            is not there, an empty split, classes that do not match, a folder with a run under other settings; for a label
            outside the classes.
        OSError: for a folder that cannot be written to, a full disk; for an image whose file cannot be read. All records
            written before stand, and a later run goes on.
        KeyboardInterrupt: on the user's, with a message that says how many records are there.
    """
    output_dir = Path(output_dir)
    at: dict[str, Any] = {} if settings.revision is None else {"revision": settings.revision}
    if at and Path(settings.model_name_or_path).is_dir():
        raise ValueError(
            f"revision={settings.revision!r} is for models on the Hub; {settings.model_name_or_path!r} is a local folder."
        )
    on_main_first(accelerator, partial(check_folder, output_dir, resume))
    with accelerator.main_process_first():  # one downloads, the others find it there
        images = LabelledImages(
            settings.dataset_name,
            config_name=settings.dataset_config_name,
            split=settings.split,
            image_column=settings.image_column,
            label_column=settings.label_column,
            every=settings.every,
            max_samples=settings.max_samples,
            streaming=streaming,
        )
        with loading(settings.model_name_or_path):
            smoothed = SmoothedClassifier.from_pretrained(
                settings.model_name_or_path,
                GaussianNoise(settings.sigmas[0]),
                batch_size=batch_size,
                device=accelerator.device,
                autocast=DTYPES[settings.dtype],
                count_head=settings.count_head,
                noise_resolution=settings.noise_resolution,
                denoiser=settings.denoiser,
                **at,
            )
    if settings.delta is not None:
        smoothed.check_calibration()
    names = list(smoothed.class_names or ())
    images.meet(names, smoothed.preprocessing)

    def begin() -> Plan:
        session = session_of(accelerator, smoothed)
        return prepare(output_dir, _identity(settings, images, smoothed), session, images)

    plan = on_main_first(accelerator, begin)
    images.shape = plan.shape
    queue = WorkQueue(accelerator, plan.start)
    writer = ShardWriter(output_dir / "shards" / f"records-rank{accelerator.process_index:05d}.jsonl")
    expected = None if images.total is None else images.total * len(settings.sigmas)
    at_most = expected or (settings.max_samples and settings.max_samples * len(settings.sigmas))
    before = {sigma: plan.before.get(sigma, (0, 0)) for sigma in settings.sigmas}
    progress = Progress(queue, before, settings.smallest_radius, at_most, accelerator.is_main_process, settings.method)
    ended = time.monotonic()

    def keep(row: Record) -> None:
        nonlocal ended
        row["seconds"], ended = time.monotonic() - ended, time.monotonic()
        writer.write(row)
        queue.count(row["sigma"], is_right(row, settings.smallest_radius), row["num_samples"])
        progress.update(row["sigma"])

    try:
        for sigma in settings.sigmas:
            smoothed.noise = GaussianNoise(sigma)
            work = (item for item in images.chosen() if (sigma, item[0]) not in plan.finished)
            _certify(smoothed, settings, images, queue.handed_out(work, sigma), keep)
        queue.finish()
        while accelerator.is_main_process and not queue.all_finished():
            progress.update(settings.sigmas[-1])
            time.sleep(0.05)
        progress.update(settings.sigmas[-1], at_once=True)
    except KeyboardInterrupt as error:
        queue.fail(error)
        done = f"{count_records(writer.path.parent)}{'' if expected is None else f' of {expected}'}"
        raise KeyboardInterrupt(f"stopped; {done} are done; the same command goes on") from error
    except BaseException as error:
        queue.fail(error)  # so that the main process does not wait for this one
        raise
    finally:
        progress.bar.close()
        writer.close()
    return merge(output_dir, len(plan.finished), expected) if accelerator.is_main_process else None


def _certify(
    smoothed: SmoothedClassifier,
    settings: RunSettings,
    images: LabelledImages,
    work: Iterator[tuple[int, Callable[[], Record]]],
    keep: Callable[[Record], None],
) -> None:
    """Certify the images that this process gets at the sigma of `smoothed`, and keep each record as soon as it is there."""
    names = smoothed.class_names or ()
    rule, _ = settings.rule(smoothed.noise.sigma)
    handed: list[tuple[int, int]] = []

    def pixels() -> Iterator[torch.Tensor]:
        for index, read in work:
            row = read()
            label = images.label(index, row)
            try:
                found = images.pixels(row)
            except ValueError as error:
                keep(error_record(index, label, names, smoothed, rule, settings.seed, str(error)))
            except OSError as error:  # not the image's fault: as a record it would count as wrong for good
                raise OSError(
                    f"Image {index} of the split: {error} Once it can be read, the same command goes on with the run."
                ) from error
            else:
                handed.append((index, label))
                yield found

    for position, certificate in smoothed.certify_stream(pixels(), rule, seed=settings.seed):
        index, label = handed[position]
        keep(record(index, label, names, certificate))


def _calibration(settings: RunSettings, smoothed: SmoothedClassifier) -> Record | None:
    found, shifts = smoothed.calibration, {}
    for sigma in settings.sigmas:
        rule = settings.rule(sigma)[0]
        if isinstance(rule, SurrogateRule) and rule.delta is not None:
            shifts[f"{sigma:g}"] = rule.shift(GaussianNoise(sigma))
    if not shifts or found is None:
        return None
    return {"dataset": found.dataset, "model": found.model, "n": found.n, "alpha": found.alpha, "shifts": shifts}


def classifier_identity(smoothed: SmoothedClassifier) -> Record:
    """What makes the base classifier the function that it is: weights, classes, attention and image processor."""
    model: Any = smoothed.base.classifier
    processor = smoothed.image_processor
    return {
        "label_names": smoothed.class_names,
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "model_weights": weights_digest(model),
        "image_processor": type(processor).__name__,
        "image_processor.backend": getattr(processor, "backend", None),
        **{f"image_processor.{name}": value for name, value in processor.to_dict().items()},
    }


def _identity(settings: RunSettings, images: LabelledImages, smoothed: SmoothedClassifier) -> Record:
    """What must be the same for a run to be gone on with, as plain values. Processes, batch size and device may change."""
    model: Any = smoothed.base.classifier
    head = smoothed.count_head
    return {
        **asdict(replace(settings, image_column=images.image_column, label_column=images.label_column)),
        "dataset_fingerprint": images.fingerprint,
        "dataset_label_names": images.class_names,
        "model_commit": getattr(model.config, "_commit_hash", None),
        **classifier_identity(smoothed),
        "count_head_weights": weights_digest(head.model) if isinstance(head, CountPredictor) else None,
        "calibration": _calibration(settings, smoothed),
        "radii_decided": {f"{sigma:g}": settings.rule(sigma)[1] for sigma in settings.sigmas},
    }
