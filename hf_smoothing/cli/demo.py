"""The demo: certify the pictures that ship with the package, and show what comes out."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig

from ..core.certificates import Certificate, format_radius
from ..core.count_predictor import CountPredictor
from ..core.loading import loading, weights_digest
from ..core.noise import GaussianNoise
from ..core.preprocessing import to_pixels
from ..core.smoothing import SmoothedClassifier
from ..data.demo_images import load_demo_images
from ..metrics.certified_accuracy import certified_accuracy
from ..reporting.examples import picture_of_certificates
from ..reporting.plots import require_matplotlib
from ..reporting.tables import print_table
from ..runs.dataset_run import RunSettings
from ..runs.records import record, write_parquet
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions

DEMO_IMAGES = "hf_smoothing/data/cifar10_demo.parquet"
DEMO_RADII = (0.0, 0.25, 0.5)


def run_demo(
    model: str,
    output_dir: Path,
    sigma: float,
    alpha: float,
    max_draws: int,
    seed: int,
    batch_size: int,
    count_head: str | None = None,
) -> None:
    """
    Certify the 200 CIFAR-10 test images of the package; write records, `run.json` and pictures, and print a table.

    Args:
        model: an image classifier of the classes of CIFAR-10.
        output_dir: where to write.
        sigma: noise level, in `[0, 1]` pixels.
        alpha: probability that a certificate is wrong.
        max_draws: the most draws for one picture.
        seed: of the noise.
        batch_size: draws in one forward pass.
        count_head: of the model, to draw less; by default the one in the folder `MODEL-counts`, if there is one.

    Raises:
        ImportError: without matplotlib.
        OSError: for a folder that cannot be written to.
        ValueError: for a model that cannot be loaded or has other classes, and settings out of range.
    """
    started = time.monotonic()
    console = Console()
    require_matplotlib()  # and a folder to write to, before the work
    output_dir.mkdir(parents=True, exist_ok=True)
    if count_head is None and Path(beside := f"{model}-counts").is_dir():
        levels = AutoConfig.from_pretrained(beside).count_sigmas
        if min(levels) <= sigma <= max(levels):
            count_head = beside
        else:
            console.print(
                f"{beside} knows noise levels from {min(levels):g} to {max(levels):g}: certifying without it."
            )
    settings = RunSettings(
        model_name_or_path=model,
        dataset_name=DEMO_IMAGES,
        sigmas=(sigma,),
        image_column="image",
        label_column="label",
        radii=DEMO_RADII,
        alpha=alpha,
        max_draws=max_draws,
        seed=seed,
        count_head=count_head,
    )
    with loading(model):
        smoothed = SmoothedClassifier.from_pretrained(
            model, GaussianNoise(sigma), batch_size=batch_size, count_head=count_head
        )
    head, images = smoothed.count_head, load_demo_images()
    names = images.features["label"].names
    if smoothed.class_names != names:
        raise ValueError(f"{model} has the classes {smoothed.class_names}; the pictures have {names}.")
    pictures, labels = list(images["image"]), list(images["label"])
    certificates = smoothed.certify(
        pictures, radii=DEMO_RADII, alpha=alpha, max_draws=max_draws, seed=seed, progress=True
    )
    rows = [record(index, label, names, one) for index, (label, one) in enumerate(zip(labels, certificates))]
    write_parquet(rows, output_dir / "certificates.parquet")
    predictions, radii = [found.prediction for found in certificates], [found.radius for found in certificates]
    title = (
        f"Certified at sigma = {sigma:g}, alpha = {alpha:g}: no change smaller than r "
        f"({certificates[0].norm}, [0, 1] pixels) changes the answer"
    )
    for file, at_most in (("certificates.png", None), ("certificates-few.png", 30)):
        picture_of_certificates(
            pictures.__getitem__, predictions, radii, labels, names, title, output_dir / file, at_most=at_most
        )
    guarantees = [found.guarantee for found in certificates]
    figures = certified_accuracy(predictions, labels, radii, DEMO_RADII, guarantees=guarantees)
    run = {
        "settings": {
            **asdict(settings),
            "dataset_fingerprint": None,
            "dataset_label_names": names,
            "model_weights": weights_digest(smoothed.base_classifier.classifier),
            "count_head_weights": weights_digest(head.model) if isinstance(head, CountPredictor) else None,
            "label_names": names,
        },
        "image_shape": list(to_pixels(pictures[0], smoothed.preprocessing).shape),
        "sessions": [{"device": str(smoothed.device), "num_threads": torch.get_num_threads()}],
        "command": command_line(),
        "versions": package_versions(),
        "num_records": len(rows),
        "guarantee": figures["guarantee"],
        "certified_accuracy": figures["certified_accuracy"],
        "mean_draws": sum(found.num_samples for found in certificates) / len(certificates),
        "seconds": time.monotonic() - started,
    }
    write_json(run, output_dir / "run.json")
    _show_demo(console, run, certificates, labels, names, output_dir)


def _show_demo(
    console: Console,
    run: dict[str, Any],
    certificates: list[Certificate],
    labels: list[int],
    names: list[str],
    output_dir: Path,
    shown: int = 40,
) -> None:
    rows = [
        {
            "image": index,
            "label": names[label],
            "prediction": "(abstains)" if found.abstains else names[found.prediction],
            "radius": format_radius(found.radius),
            "draws": found.num_samples,
            "guarantee": found.guarantee,
        }
        for index, (found, label) in enumerate(zip(certificates[:shown], labels))
    ]
    (sigma,), alpha = run["settings"]["sigmas"], run["settings"]["alpha"]
    print_table(
        console, f"The first {len(rows)} of {len(labels)} pictures (sigma = {sigma:g}, alpha = {alpha:g})", rows
    )
    console.print(f"Certified accuracy over all {len(labels)} pictures, abstentions counted as wrong [95 % interval]:")
    for row in run["certified_accuracy"]:
        low, high = row["interval_95"]
        text = f"  r = {row['radius']:<5g} {row['share']:.1%} [{low:.1%}, {high:.1%}]"
        console.print(text, markup=False, highlight=False)
    steered = "" if run["settings"]["count_head"] is None else " with a count head to say where to look"
    console.print(
        f"{run['mean_draws']:.0f} forward passes a picture on average{steered} (the usual protocol takes 100,100), "
        f"{run['seconds']:.0f} s in all."
    )
    written = f"Wrote {output_dir / 'certificates.parquet'} and {output_dir / 'certificates.png'}."
    console.print(written, markup=False, soft_wrap=True)
