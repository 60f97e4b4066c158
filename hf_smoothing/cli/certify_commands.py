"""The commands that certify: `certify`, `certify-dataset` and `demo`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runs.settings import ExecutionSettings, NoiseLevel, RunSettings
from . import options
from ._errors import command

if TYPE_CHECKING:
    from ..core.certificates import Certificate

app = typer.Typer()

DEMO_MODEL = "model_cards/mixed-noise-vit-nano-cifar10"


@command(app)
def certify(
    images: Annotated[
        list[str], typer.Argument(callback=options.check_pictures, help="Pictures: paths or http(s) addresses.")
    ],
    model: options.Model,
    sigma: Annotated[
        list[NoiseLevel] | None,
        typer.Option(
            parser=NoiseLevel,
            metavar="FLOAT|auto",
            help="Standard deviation of the noise, for pixels in `[0, 1]`, or several of them: alpha holds for each alone. "
            "`auto`: one classifier of two levels, see `--levels` and `--agreement`.",
            show_default="0.25",
        ),
    ] = None,
    alpha: options.Alpha = 0.001,
    radius: Annotated[
        float | None,
        typer.Option(
            help="Only decide whether the radius is at least this. Without it, find the radius. (`surrogate` needs "
            "`--delta`, and claims this radius or nothing.)"
        ),
    ] = None,
    max_draws: options.MaxDraws = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="`two-stage` finds the radius (the default), `sequential` decides `--radius` (the default with it), "
            "`fixed` draws a fixed number, `surrogate` only asks the count head, `counts` counts classes and proves nothing."
        ),
    ] = None,
    draws: Annotated[int | None, options.option("draws")] = None,
    count_head: options.CountHead = None,
    levels: Annotated[list[float] | None, options.option("levels")] = None,
    agreement: Annotated[float | None, options.option("agreement")] = None,
    delta: options.Delta = None,
    noise_resolution: options.NoiseResolution = "input",
    denoiser: options.Denoiser = None,
    seed: options.Seed = None,
    batch_size: options.BatchSize = 128,
    device: options.Device = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per picture instead of a table.")
    ] = False,
) -> None:
    """
    Certify pictures: print the predictions and their radii. No change smaller than the radius changes the prediction.

    The radius is an l2 distance for pixels in `[0, 1]`, rounded down. `passes` are forward passes of the model: the draws,
    and with `sequential` one of the clean picture. The radius refers to the picture at the model's input size, or at the
    size given by `--noise-resolution`.

    Example: `hf-smoothing certify frog.png --model user/repo --sigma 0.5`
    """
    from ..core.image_loading import load_image
    from ..core.preprocessing import to_pixels
    from ..core.sampler import in_order
    from ..runs.identity import at_level, load_classifier
    from ..runs.time_estimate import announce_time

    sigmas = sigma or [0.25]
    chosen: dict[str, Any] = {"alpha": alpha, "draws": draws, "max_draws": max_draws, "method": method, "seed": seed}
    chosen |= {"radii": None if radius is None else [radius], "count_head": count_head, "delta": delta}
    chosen |= {"noise_resolution": noise_resolution, "denoiser": denoiser, "levels": levels, "agreement": agreement}
    settings = RunSettings(model, "pictures", sigmas, **chosen)  # checks them before it loads
    rules = [settings.rule(level)[0] for level in sigmas]
    pictures = [load_image(name) for name in images]
    described = {**asdict(settings), "noise_resolution": settings.resolution}
    smoothed = load_classifier(described, device or "cpu", batch_size)
    if delta is not None:
        smoothed.check_calibration()
    classifiers = [at_level(smoothed, level, described) for level in sigmas]
    pixels = [to_pixels(picture, smoothed.preprocessing) for picture in pictures]
    takes_long = announce_time(rules[0], smoothed, pixels[0], len(sigmas) * len(pixels))
    shown = takes_long or sys.stderr.isatty()
    results = []
    for classifier, rule in zip(classifiers, rules):
        stream = classifier.certify_stream(pixels, rule, seed=seed, progress=shown)
        results += [_to_result(*pair, smoothed.class_names or ()) for pair in zip(images, in_order(stream))]
    if json_lines:
        print("\n".join(map(json.dumps, results)))
    elif method == "counts":
        _print_counts(results, smoothed.class_names or ())
    else:
        _print_certificates(results, radius, noise_resolution)
        print(_say_what_is_known(smoothed.class_names or ()))


def _say_what_is_known(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"The model knows {len(names)} classes: {shown}. A certificate does not say that its answer is right."


def _to_result(image: str, certificate: "Certificate", names: Sequence[str]) -> dict[str, Any]:
    label = None if certificate.abstains else names[certificate.prediction]
    return {"image": image, "label": label, **certificate.to_dict()}


def _print_counts(results: list[dict[str, Any]], names: Sequence[str]) -> None:
    from rich.console import Console

    from ..reporting.tables import print_table

    rows = []
    for result in results:
        ranked = sorted(zip(result["counts"], names), key=lambda pair: -pair[0])
        counts = ", ".join(f"{name} {number}" for number, name in ranked[:3] if number)
        rows.append({"image": result["image"], "sigma": f"{result['sigma']:g}", "most frequent classes": counts})
    print_table(Console(), f"Classes of {results[0]['num_samples']:,} noisy copies; counts prove no radius", rows)


def _print_certificates(results: list[dict[str, Any]], radius: float | None, noise_resolution: str) -> None:
    from rich.console import Console

    from ..core.certificates import format_radius
    from ..reporting.tables import print_table

    size = "of the model's input" if noise_resolution == "input" else f"at resolution {noise_resolution}"
    after = "" if results[0]["denoiser"] is None else f", {results[0]['denoiser']} in front of the model"
    deltas = {f", delta = {result['delta']:g} ({result['calibration']})" for result in results if result["delta"]}
    asked = "How far does the prediction hold?"
    if results[0]["method"] in ("sequential", "surrogate") and radius is not None:
        asked = f"Does the prediction hold to radius {radius:g}?"
    title = (
        f"{asked} alpha = {results[0]['alpha']:g}{''.join(sorted(deltas))}, l2 radius in [0, 1] pixels {size}{after}"
    )
    rows = [
        {
            "image": result["image"],
            "sigma": f"{result['sigma']:g}{' (auto)' if result['level_choice'] else ''}",
            "prediction": result["label"] or "(abstains)",
            "radius": format_radius(result["radius"]),
            "passes": result["num_samples"],
            "guarantee": result["guarantee"],
        }
        for result in results
    ]
    print_table(Console(), title, rows)


@command(app)
@options.with_run_options
def certify_dataset(settings: RunSettings, execution: ExecutionSettings) -> None:
    """
    Certify the images of a dataset: one row per image and sigma in `OUTPUT_DIR/certificates.parquet`.

    `--sigma` and `--radii` take several values. You can interrupt the command: the same command resumes the run. For
    several processes or devices, `accelerate launch scripts/certify.py` does the same.

    Example: `hf-smoothing certify-dataset --model user/repo --dataset uoft-cs/cifar10 --every 20 --sigma 0.25 0.5
    --output-dir runs/cifar10`
    """
    from ..runs.dataset_run import certify_dataset
    from ..utils.processes import start_processes

    typer.echo(certify_dataset(settings, accelerator=start_processes(), **asdict(execution)))


@command(app)
def demo(
    model: options.Model = DEMO_MODEL,
    output_dir: Annotated[
        Path, typer.Option(help="New folder for certificates and pictures, or the folder of a demo to resume.")
    ] = Path("demo"),
    sigma: options.Sigma = 0.25,
    alpha: options.Alpha = 0.001,
    max_draws: options.MaxDraws = 450,
    count_head: Annotated[
        str | None,
        typer.Option(
            help="A count head, which guides the draws. Without it: the one in the folder MODEL-counts, if there is one."
        ),
    ] = None,
    seed: options.Seed = None,
    batch_size: options.BatchSize = 128,
) -> None:
    """
    Certify the 200 CIFAR-10 test images that ship with the package, and show the certificates.

    The default model is in the repository: run this in a clone, or choose a model with `--model`.
    """
    from .demo import DEMO_RADII, find_demo_images, find_head_beside, run_demo

    settings = RunSettings(
        model_name_or_path=model,
        dataset_name=find_demo_images(),
        sigmas=[sigma],
        radii=DEMO_RADII,
        alpha=alpha,
        max_draws=max_draws,
        seed=seed,
        count_head=count_head or find_head_beside(model, sigma),
    )
    run_demo(settings, output_dir, batch_size)
