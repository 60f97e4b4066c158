"""What the studies share: images decoded once, and arms that are trained, evaluated and certified in parallel processes."""

import math
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from scipy import stats
from torch.optim.swa_utils import update_bn
from transformers.hf_argparser import HfArg

from hf_smoothing import GaussianNoise, MixedNoiseViTForImageClassification, SequentialRule, SmoothedClassifier
from hf_smoothing.core.preprocessing import Preprocessing
from hf_smoothing.data.labelled_images import LabelledImages
from hf_smoothing.metrics.certified_accuracy import exact_interval
from hf_smoothing.training.augmentation import augment_small
from hf_smoothing.training.batches import Batch, Batches
from hf_smoothing.training.checkpoints import LATEST
from hf_smoothing.training.classifier_training import create_loss
from hf_smoothing.training.evaluation import predict_majority
from hf_smoothing.training.pretrained_classifiers import create_image_processor
from hf_smoothing.training.seeds import derive_seed
from hf_smoothing.training.training_images import ImageSettings, TrainingBatches, find_class_names
from hf_smoothing.training.training_loop import TrainingLoop, TrainingSettings
from hf_smoothing.utils.files import read_json, write_json

_FORWARD_BATCH = 1024
_STATISTICS_IMAGES = 2048

Arm = TypeVar("Arm")


@dataclass
class MeasurementSettings:
    """How the arms of a study are evaluated and certified, and where they run."""

    eval_split: str = HfArg(default="test", help="split of --dataset_name to evaluate on")
    eval_samples: int = HfArg(default=2000, help="images for the accuracy under noise")
    eval_draws: int = HfArg(default=5, help="noisy copies per image; their majority answer counts")
    certify_samples: int = HfArg(default=200, help="images of these to certify")
    max_draws: int = HfArg(default=500, help="most draws per image to certify it")
    alpha: float = HfArg(default=0.001, help="probability that a certificate is wrong")
    mixed_precision: str = HfArg(default="no", help="of training and evaluation: no or bf16")
    processes: int = HfArg(default=1, help="arms that run at a time; on a GPU several small models fill it")

    def check_radii(self, radii: Mapping[float, Sequence[float]]) -> None:
        """Raise a `ValueError` where `max_draws` cannot prove the radii of a noise level."""
        for sigma, values in radii.items():
            SequentialRule(tuple(values), self.alpha, self.max_draws).check(GaussianNoise(sigma))

    def check_images(self, folder: Path) -> None:
        """Raise a `ValueError` where the split has fewer decoded images in `folder` than the settings name."""
        there = len(DecodedImages.load(folder).labels)
        for name in ("eval_samples", "certify_samples"):
            if getattr(self, name) > there:
                raise ValueError(f"{name}={getattr(self, name)}: the split {self.eval_split!r} has {there} images.")

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.mixed_precision == "bf16" else None


@dataclass(frozen=True)
class DecodedImages:
    """Pixels, uint8 `(images, channels, height, width)`, labels `(images,)` and the names of the classes."""

    pixels: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]

    @classmethod
    def load(cls, folder: Path) -> "DecodedImages":
        """Map the files of [`decode_images`] into memory: processes share it."""
        pixels, labels = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("pixels", "labels"))
        return cls(
            torch.from_numpy(pixels), torch.from_numpy(labels), read_json(folder / "images.json")["class_names"]
        )

    def to_floats(self, images: slice, device: torch.device) -> torch.Tensor:
        """Pixels in `[0, 1]`."""
        return (self.pixels[images].float() / 255).to(device)


def decode_images(
    folder: Path, dataset_name: str, split: str, max_samples: int | None, image_size: int, processes: int
) -> None:
    """Decode images once for all arms, in `processes` processes; [`DecodedImages`] reads the files."""
    if (folder / "images.json").exists():
        return
    images = LabelledImages(dataset_name, split=split, max_samples=max_samples)
    class_names = find_class_names(images)
    inputs = images.bind(class_names, Preprocessing.from_image_processor(create_image_processor(image_size)))
    settings = ImageSettings(dataset_name, dataloader_num_workers=processes if processes > 1 else 0)
    source: Any = TrainingBatches(inputs, settings, image_size, 1, seed=0).source
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in zip(("pixels", "labels"), source):
        np.save(folder / f"{name}.npy", tensor.numpy())
    write_json({"class_names": class_names}, folder / "images.json")


class _DecodedBatches(Batches):
    """Augmented batches of decoded images, as `TrainingBatches` makes them."""

    def __init__(self, images: DecodedImages, settings: ImageSettings, batch_size: int, seed: int):
        super().__init__(len(images.labels), batch_size, seed, process_index=0, num_processes=1)
        self.images, self.settings = images, settings

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        for position, rows in list(enumerate(self.shuffle(number)))[first:]:
            pixels = augment_small(
                self.images.pixels[rows], self.settings, derive_seed(self.seed, number, position, 0)
            )
            yield pixels, self.images.labels[rows]


def train_arm(
    create_model: Callable[[], Any], images: DecodedImages, image_settings: ImageSettings, settings: TrainingSettings
) -> None:
    """Train a model into `settings.output_dir`, or resume its training; a finished one is left as it is."""
    folder = Path(settings.output_dir)
    if (folder / "results" / "training.json").exists():
        return
    settings.resume_from_checkpoint = LATEST
    torch.manual_seed(settings.seed)
    model = create_model()
    processor = create_image_processor(model.config.image_size)
    preprocessing = Preprocessing.from_image_processor(processor)
    batch_size = settings.per_device_train_batch_size
    loop = TrainingLoop(
        model,
        _DecodedBatches(images, image_settings, batch_size, settings.seed),
        create_loss(image_settings, batch_size, model.config.num_labels, preprocessing),
        settings,
        settings.create_accelerator(),
        processor=processor,
        fixed_settings=asdict(image_settings),
    )
    results = loop.run()
    (folder / "results").mkdir(exist_ok=True)
    write_json(results, folder / "results" / "training.json")
    for checkpoint in folder.glob("step_*"):  # the model is saved: its checkpoint only fills the disk
        shutil.rmtree(checkpoint)


def load_arm(folder: Path) -> Any:
    """The trained model of an arm, on the GPU if there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return MixedNoiseViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval().to(device or "cpu")


def evaluate_model(
    model: Any,
    images: DecodedImages,
    settings: MeasurementSettings,
    sigmas: Sequence[float],
    radii: Mapping[float, Sequence[float]],
    seed: int,
    statistics_images: DecodedImages | None = None,
) -> dict[str, Any]:
    """
    Which images a model predicts correctly at each noise level, and the radii that it certifies.

    Args:
        model: on the device to evaluate on.
        images: to evaluate on.
        settings: how to evaluate.
        sigmas: noise levels of the accuracy.
        radii: radii to certify, by noise level.
        seed: of the noise.
        statistics_images: with them, the statistics of BatchNorm are re-estimated at each noise level, on these images
            with this noise.

    Returns:
        Lists by noise level: `right`, and `certified_radius` (-1 for a wrong prediction).
    """
    device = next(model.parameters()).device
    pixels, labels = images.to_floats(slice(settings.eval_samples), device), images.labels[: settings.eval_samples]
    right, certified = {}, {}
    for sigma in sorted({*sigmas, *radii}):
        if statistics_images is not None:
            _reestimate_statistics(model, statistics_images, sigma, seed)
        model.eval()
        if sigma in sigmas:
            context: Any = nullcontext()
            if settings.autocast is not None:
                context = torch.autocast(device.type, settings.autocast)
            with context:
                predictions = predict_majority(
                    model, pixels, sigma, draws=settings.eval_draws, batch_size=_FORWARD_BATCH, seed=seed
                )
            right[f"{sigma:g}"] = (predictions.cpu() == labels).tolist()
        if sigma in radii:
            smoothed = SmoothedClassifier(
                model, GaussianNoise(sigma), batch_size=_FORWARD_BATCH, autocast=settings.autocast
            )
            certificates = smoothed.certify(
                images.to_floats(slice(settings.certify_samples), torch.device("cpu")),
                radii=tuple(radii[sigma]),
                alpha=settings.alpha,
                max_draws=settings.max_draws,
                seed=seed,
            )
            # a wrong prediction is not even certified at radius 0
            certified[f"{sigma:g}"] = [
                certificate.radius if certificate.prediction == label else -1.0
                for certificate, label in zip(certificates, images.labels.tolist())
            ]
    return {"right": right, "certified_radius": certified}


@torch.no_grad()
def _reestimate_statistics(model: Any, images: DecodedImages, sigma: float, seed: int) -> None:
    """Replace the statistics of BatchNorm by their averages over images with noise."""
    device = next(model.parameters()).device
    step = max(1, len(images.labels) // _STATISTICS_IMAGES)  # a dataset may be sorted by class
    pixels = images.to_floats(slice(0, step * _STATISTICS_IMAGES, step), device)
    generator = torch.Generator(device).manual_seed(seed)
    noisy = pixels + sigma * torch.randn(pixels.shape, generator=generator, device=device)
    update_bn(noisy.split(256), model)


def run_arms(
    run_arm: Callable[[Arm], None],
    arms: Mapping[str, Arm],
    output_dir: Path,
    processes: int,
    write_results: Callable[[], None],
) -> None:
    """
    Run the arms of a study, `processes` at a time, each in a process of its own; its output goes to `NAME.log`.

    Processes are forked from a server that has imported everything, and has not touched a GPU.

    Args:
        run_arm: trains and evaluates an arm; a function of a module.
        arms: by name.
        output_dir: folder for the logs.
        processes: arms at a time. 1 runs them in this process.
        write_results: called after each arm, so that an interrupted study leaves the results of finished arms.

    Raises:
        ValueError: if arms failed, after the others have finished.
    """
    if processes == 1:
        for number, (name, arm) in enumerate(arms.items(), 1):
            print(f"{name} ({number} of {len(arms)})", flush=True)
            run_arm(arm)
            write_results()
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_smoothing.training.classifier_training", "matplotlib.figure", "rich.console"])
    threads = max(1, torch.get_num_threads() // processes)
    waiting, failed = list(arms), []
    running: dict[Any, Any] = {}  # name and process, by the handle that becomes ready when the process ends
    # all in one thread: a process whose end two threads notice may lose its exit status
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            arguments = (run_arm, arms[name], output_dir / f"{name}.log", threads)
            process = context.Process(target=_run_logged, args=arguments, daemon=True)
            process.start()
            running[process.sentinel] = name, process
        for sentinel in wait(list(running)):
            name, process = running.pop(sentinel)
            process.join()
            print(f"{name}: {'finished' if process.exitcode == 0 else 'failed'}", flush=True)
            failed += [] if process.exitcode == 0 else [name]
            write_results()
    if failed:
        raise ValueError(
            f"These arms failed: {', '.join(failed)}. Their logs in {output_dir} say why; the same command tries them again."
        )


def _run_logged(run_arm: Callable[[Arm], None], arm: Arm, log: Path, threads: int) -> None:
    with log.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    run_arm(arm)


def _end_with_the_study() -> None:
    """However the study ends: an arm that trains on would meet the same arm of the resumed study."""
    study = multiprocessing.parent_process()
    assert study is not None
    study.join()
    os._exit(1)


def check_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """Save the settings of a new study. Raises a `ValueError` where the folder holds a study with other settings."""
    path = output_dir / "settings.json"
    if path.exists() and read_json(path) != settings:
        raise ValueError(f"{output_dir} holds a study with other settings, see {path}: choose another folder.")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(settings, path)


def compute_share(right: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """
    Mean share over the seeds of an arm, `right[seed][image]`, with its 95 % interval: over seeds (Student t), or of one seed
    over its images (exact).
    """
    if len(right) == 1:
        return {"share": float(np.mean(right)), "interval_95": exact_interval(sum(right[0]), len(right[0]))}
    shares = np.mean(right, axis=1)
    low, high = _interval(shares)
    return {"share": float(shares.mean()), "interval_95": [max(low, 0.0), min(high, 1.0)], "seeds": shares.tolist()}


def compute_difference(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """
    Mean difference of two accuracies on the same images, `[seed][image]`, with its 95 % interval: over the differences of
    seeds, or with one seed over those of images (Student t).
    """
    differences = np.subtract(first, second, dtype=float)
    by_seed = differences.mean(1)
    samples = by_seed if len(by_seed) > 1 else differences[0]
    return {"difference": float(samples.mean()), "interval_95": _interval(samples), "seeds": by_seed.tolist()}


def _interval(samples: np.ndarray) -> list[float]:
    """The 95 % interval of a mean by Student's t."""
    half = stats.t.ppf(0.975, len(samples) - 1) * samples.std(ddof=1) / math.sqrt(len(samples))
    return [float(samples.mean() - half), float(samples.mean() + half)]
