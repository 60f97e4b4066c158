"""Certifies a dataset: with any number of processes, resumable, one record per image and noise level.

Processes take images one at a time from a counter that they share, so that none idles while there is work, however much
the images differ in cost. The noise of an image depends only on the seed and its pixels, so it does not matter which
process takes it, when, or in which batch.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from ..core.certificates import ABSTAIN
from ..core.noise import GaussianNoise
from ..core.smoothing import SmoothedClassifier
from ..core.surrogate_rule import SurrogateRule
from ..data.labelled_images import ModelInputs
from ..utils.processes import on_main_first
from .identity import at_level, describe_run, describe_session, load_classifier, open_images
from .recorder import Recorder
from .records import Record, error_record, record
from .run_folder import RunFolder, RunState, RunSummary
from .settings import NoiseLevel, RunSettings
from .time_estimate import announce_time


def certify_dataset(
    settings: RunSettings,
    output_dir: str | Path,
    *,
    accelerator: Accelerator,
    batch_size: int = 128,
    streaming: bool = False,
    resume: bool = True,
    device: str | None = None,
) -> RunSummary | None:
    """
    Certify the images of a dataset, or resume doing so, and merge the records to `output_dir/certificates.parquet`.

    See [`RunFolder`] for the files. An image whose content is not a picture, or that has another shape after the image
    processor than the first one, gets a record with an `error`.

    Args:
        settings: what decides the records.
        output_dir: a new or empty folder, or the folder of a run with the same settings, which is resumed.
        accelerator: the processes, from [`start_processes`].
        batch_size: draws in one forward pass.
        streaming: read the dataset as a stream, once for each sigma, without storing it.
        resume: resume a run; otherwise the folder must not hold one.
        device: where to compute; by default where the accelerator is.

    Returns:
        A summary, on the main process; `None` on the others.

    Raises:
        ValueError: before any work, for a model or dataset that cannot be loaded, a missing column, an empty split, classes
            that do not match, a folder with a run under other settings or that hosts do not share; for a label outside
            the classes.
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
    folder.check_shared(accelerator)
    requested = {**asdict(settings), "noise_resolution": settings.resolution}
    with accelerator.main_process_first():  # the main process prepares the dataset, the others read from its cache
        images = open_images(requested, streaming)
    smoothed = load_classifier(requested, device or accelerator.device, batch_size)
    if settings.delta is not None or settings.false_claims is not None:
        smoothed.check_calibration()
    inputs = images.bind(smoothed.class_names or (), smoothed.preprocessing)

    classifiers = {level: at_level(smoothed, level, requested) for level in settings.sigmas}

    def start() -> RunState:
        session = describe_session(accelerator, smoothed)
        return folder.start(describe_run(settings, images, smoothed), session, partial(_find_shape, inputs))

    state = on_main_first(accelerator, start)
    expected = None if images.total is None else images.total * len(settings.sigmas)
    if accelerator.is_main_process and expected is not None and (pixels := _find_pixels(inputs)) is not None:
        rule, _ = settings.rule(settings.sigmas[0])
        announce_time(rule, smoothed, pixels, expected - len(state.finished), accelerator.num_processes)
    recorder = Recorder(folder, state, settings, accelerator, expected)
    try:
        for level, classifier in classifiers.items():
            _certify(classifier, level, inputs, state, recorder)
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
    select = None if settings.false_claims is None else partial(_select_claims, settings)
    return folder.finish(len(state.finished), expected, select) if accelerator.is_main_process else None


def _find_pixels(inputs: ModelInputs) -> torch.Tensor | None:
    """The first image that can be read."""
    for _, read in inputs.images.rows():
        with suppress(ValueError):
            return inputs.pixels(read())
    return None


def _find_shape(inputs: ModelInputs) -> tuple[int, ...] | None:
    pixels = _find_pixels(inputs)
    return None if pixels is None else tuple(pixels.shape)


def _select_claims(settings: RunSettings, records: list[Record]) -> list[Record]:
    """The records with claims in place of estimates: with `false_claims`, they depend on all images of a noise level."""
    selected = [row for row in records if row["error"] is not None]
    for sigma in settings.single_levels:
        rule, _ = settings.rule(sigma)
        assert isinstance(rule, SurrogateRule)
        rows = [row for row in records if row["sigma"] == sigma and row["error"] is None]
        claims = rule.select(GaussianNoise(sigma), [(row["prediction"], row["p_lower"]) for row in rows])
        for row, claim in zip(rows, claims):
            name = None if claim["prediction"] == ABSTAIN else row["prediction_name"]
            selected.append({**row, **claim, "prediction_name": name})
    return selected


def _certify(
    smoothed: SmoothedClassifier, level: NoiseLevel, inputs: ModelInputs, state: RunState, recorder: Recorder
) -> None:
    """Certify the images that this process takes at one level, and keep each record as soon as it is there."""
    names, seed = smoothed.class_names or (), state.seed
    rule, _ = recorder.settings.rule(level)
    work = ((index, read) for index, read in inputs.images.rows() if (level, index) not in state.finished)
    # where the base classifier resizes, after the noise, it takes all sizes
    one_shape = inputs.preprocessing is None or inputs.preprocessing.resize is None
    admitted: list[tuple[int, int]] = []

    def read_pixels() -> Iterator[torch.Tensor]:
        for index, read in recorder.queue.take(work, level):
            row = read()
            label = inputs.label(index, row)
            try:
                pixels = inputs.pixels(row)
                if one_shape and state.image_shape not in (None, pixels.shape):
                    shapes = f"{tuple(pixels.shape)} after the image processor, the first one {state.image_shape}"
                    raise ValueError(f"The image has shape {shapes}.")
            except ValueError as error:
                recorder.keep(error_record(index, label, names, smoothed, rule, seed, str(error)))
            except OSError as error:  # may be read another day: a record would count the image as wrong for good
                raise OSError(
                    f"Image {index} of the split: {error} Once it can be read, the same command resumes the run."
                ) from error
            else:
                admitted.append((index, label))
                yield pixels

    for position, certificate in smoothed.certify_stream(read_pixels(), rule, seed=seed):
        recorder.keep(record(*admitted[position], names, certificate))
