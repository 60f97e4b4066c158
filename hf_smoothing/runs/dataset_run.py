"""Certifies a dataset: with any number of processes, resumable, one record per image and noise level.

Processes take images one at a time from a counter that they share, so that none idles while there is work, however much
the images differ in cost. The noise of an image depends only on the seed and its pixels, so it does not matter which
process takes it, when, or in which batch.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..core.loading import loading
from ..core.noise import GaussianNoise
from ..core.smoothing import SmoothedClassifier
from ..data.labelled_images import LabelledImages
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
    folder = RunFolder(output_dir)
    at: dict[str, Any] = {} if settings.revision is None else {"revision": settings.revision}
    if at and Path(settings.model_name_or_path).is_dir():
        raise ValueError(
            f"revision={settings.revision!r} is for models on the Hub; {settings.model_name_or_path!r} is a local folder."
        )
    on_main_first(accelerator, partial(folder.check, resume))
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
                noise_resolution=settings.resolution,
                denoiser=settings.denoiser,
                **at,
            )
    if settings.delta is not None:
        smoothed.check_calibration()
    names = list(smoothed.class_names or ())
    images.meet(names, smoothed.preprocessing)

    def start() -> RunState:
        session = describe_session(accelerator, smoothed)
        return folder.start(describe_run(settings, images, smoothed), session, images.find_shape)

    plan = on_main_first(accelerator, start)
    images.shape = plan.image_shape
    queue = WorkQueue(accelerator, plan.start)
    writer = folder.open_shard(accelerator.process_index)
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
        done = f"{folder.count_records()}{'' if expected is None else f' of {expected}'}"
        raise KeyboardInterrupt(f"stopped; {done} are done; the same command resumes") from error
    except BaseException as error:
        queue.fail(error)  # so that the main process does not wait for this one
        raise
    finally:
        progress.bar.close()
        writer.close()
    return folder.finish(len(plan.finished), expected) if accelerator.is_main_process else None


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
