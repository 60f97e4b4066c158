"""Certifies a dataset: with any number of processes, resumable, one record per image and noise level.

Processes take images one at a time from a counter that they share, so that none idles while there is work, however much
the images differ in cost. The noise of an image depends only on the seed and its pixels, so it does not matter which
process takes it, when, or in which batch.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..core.loading import loading
from ..core.noise import GaussianNoise
from ..core.smoothing import SmoothedClassifier
from ..data.labelled_images import LabelledImages, ModelInputs
from ..utils.processes import on_main_first
from .identity import describe_run, describe_session
from .progress import Progress
from .records import Record, error_record, is_right, record
from .run_folder import RunFolder, RunState, RunSummary
from .settings import RunSettings
from .work_queue import WorkQueue

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
"""Types of the forward passes by name, as the engine takes them: float32 weights, with autocast or without."""


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
    Certify the images of a dataset, or resume doing so, and merge the records to `output_dir/certificates.parquet`.

    Meanwhile every process appends to a shard of its own, `output_dir/shards/records-rank00000.jsonl`; `output_dir/run.json`
    holds what makes the run reproducible. An image whose content is not a picture, or that has another shape after the image
    processor than the first one, gets a record with an `error`.

    Args:
        settings: what decides the records.
        output_dir: a new or empty folder, or the folder of a run with the same settings, which is resumed.
        accelerator: the processes, from [`start_processes`].
        batch_size: draws in one forward pass.
        streaming: read the dataset as a stream, once for each sigma, without storing it.
        resume: resume a run; otherwise the folder must not hold one.

    Returns:
        A summary, on the main process; `None` on the others.

    Raises:
        ValueError: before any work, for settings that make no sense, a model or dataset that cannot be loaded, a missing
            column, an empty split, classes that do not match, a folder with a run under other settings; for a label
            outside the classes.
        OSError: for a folder that cannot be written to, a full disk, an image whose file cannot be read. All records
            written before are kept, and the same call resumes the run.
        KeyboardInterrupt: on the user's, with a message that says how many records there are.
    """
    folder = RunFolder(output_dir)
    if settings.revision is not None and Path(settings.model_name_or_path).is_dir():
        raise ValueError(
            f"revision={settings.revision!r} is for models on the Hub; {settings.model_name_or_path!r} is a local folder."
        )
    on_main_first(accelerator, partial(folder.check, resume))
    with accelerator.main_process_first():  # the main process downloads, the others read from its cache
        images = _load_images(settings, streaming)
        smoothed = _load_classifier(settings, accelerator.device, batch_size)
    if settings.delta is not None:
        smoothed.check_calibration()
    inputs = images.bind(smoothed.class_names or (), smoothed.preprocessing)

    def start() -> RunState:
        session = describe_session(accelerator, smoothed)
        return folder.start(describe_run(settings, images, smoothed), session, partial(_find_shape, inputs))

    state = on_main_first(accelerator, start)
    expected = None if images.total is None else images.total * len(settings.sigmas)
    recorder = _Recorder(folder, state, settings, accelerator, expected)
    try:
        for sigma in settings.sigmas:
            work = (item for item in images.rows() if (sigma, item[0]) not in state.finished)
            noisy = smoothed.with_noise(GaussianNoise(sigma))
            _certify(noisy, settings, inputs, state.image_shape, recorder.queue.take(work, sigma), recorder.keep)
        recorder.finish()
    except KeyboardInterrupt as error:
        recorder.queue.fail(error)
        done = f"{folder.count_records()}{'' if expected is None else f' of {expected}'}"
        raise KeyboardInterrupt(f"stopped; {done} are done; the same command resumes the run") from error
    except BaseException as error:
        recorder.queue.fail(error)  # so that the main process does not wait for this one
        raise
    finally:
        recorder.close()
    return folder.finish(len(state.finished), expected) if accelerator.is_main_process else None


def _load_images(settings: RunSettings, streaming: bool) -> LabelledImages:
    return LabelledImages(
        settings.dataset_name,
        config_name=settings.dataset_config_name,
        split=settings.split,
        image_column=settings.image_column,
        label_column=settings.label_column,
        every=settings.every,
        max_samples=settings.max_samples,
        streaming=streaming,
    )


def _load_classifier(settings: RunSettings, device: torch.device, batch_size: int) -> SmoothedClassifier:
    at_revision: dict[str, Any] = {} if settings.revision is None else {"revision": settings.revision}
    with loading(settings.model_name_or_path):
        return SmoothedClassifier.from_pretrained(
            settings.model_name_or_path,
            GaussianNoise(settings.sigmas[0]),
            batch_size=batch_size,
            device=device,
            autocast=DTYPES[settings.dtype],
            count_head=settings.count_head,
            noise_resolution=settings.resolution,
            denoiser=settings.denoiser,
            **at_revision,
        )


class _Recorder:
    """Keeps the records of this process: in its shard, in the counts that all processes share, and in the progress bar."""

    def __init__(
        self, folder: RunFolder, state: RunState, settings: RunSettings, accelerator: Accelerator, expected: int | None
    ):
        self.queue = WorkQueue(accelerator, state.start)
        self.writer = folder.open_shard(accelerator.process_index)
        self.settings, self.is_main_process = settings, accelerator.is_main_process
        at_most = expected or (settings.max_samples and settings.max_samples * len(settings.sigmas))
        before = {sigma: state.before.get(sigma, (0, 0)) for sigma in settings.sigmas}
        radius, shown = settings.smallest_radius, accelerator.is_main_process
        self.progress = Progress(self.queue, before, radius, at_most, shown, settings.method)
        self.last = time.monotonic()

    def keep(self, row: Record) -> None:
        """Write a record as soon as it is there."""
        now = time.monotonic()
        row["seconds"], self.last = now - self.last, now
        self.writer.write(row)
        self.queue.count(row["sigma"], is_right(row, self.settings.smallest_radius), row["num_samples"])
        self.progress.update(row["sigma"])

    def finish(self) -> None:
        """Say that this process has no work left; the main process waits for the others."""
        self.queue.finish()
        while self.is_main_process and not self.queue.all_finished():
            self.progress.update(self.settings.sigmas[-1])
            time.sleep(0.05)
        self.progress.update(self.settings.sigmas[-1], at_once=True)

    def close(self) -> None:
        self.progress.bar.close()
        self.writer.close()


def _find_shape(inputs: ModelInputs) -> tuple[int, ...] | None:
    """The shape of the first image that is a picture."""
    for _, read in inputs.images.rows():
        with suppress(ValueError):
            return tuple(inputs.pixels(read()).shape)
    return None


def _certify(
    smoothed: SmoothedClassifier,
    settings: RunSettings,
    inputs: ModelInputs,
    shape: tuple[int, ...] | None,
    work: Iterator[tuple[int, Callable[[], Record]]],
    keep: Callable[[Record], None],
) -> None:
    """Certify the images that this process takes at the sigma of `smoothed`, and keep each record as soon as it is there."""
    names = smoothed.class_names or ()
    rule, _ = settings.rule(smoothed.noise.sigma)
    admitted: list[tuple[int, int]] = []

    def read_pixels() -> Iterator[torch.Tensor]:
        for index, read in work:
            row = read()
            label = inputs.label(index, row)
            try:
                pixels = inputs.pixels(row)
                _check_shape(pixels, shape, inputs)
            except ValueError as error:
                keep(error_record(index, label, names, smoothed, rule, settings.seed, str(error)))
            except OSError as error:  # may be read another day: a record would count the image as wrong for good
                raise OSError(
                    f"Image {index} of the split: {error} Once it can be read, the same command resumes the run."
                ) from error
            else:
                admitted.append((index, label))
                yield pixels

    for position, certificate in smoothed.certify_stream(read_pixels(), rule, seed=settings.seed):
        index, label = admitted[position]
        keep(record(index, label, names, certificate))


def _check_shape(pixels: torch.Tensor, shape: tuple[int, ...] | None, inputs: ModelInputs) -> None:
    # where the base classifier resizes, after the noise, it takes all sizes
    takes_one_shape = inputs.preprocessing is None or inputs.preprocessing.resize is None
    if takes_one_shape and shape is not None and tuple(pixels.shape) != shape:
        raise ValueError(
            f"The image has shape {tuple(pixels.shape)} after the image processor, the first one {shape}."
        )
