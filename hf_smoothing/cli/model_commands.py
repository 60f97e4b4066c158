"""The commands that examine models: `calibrate`, `check` and `audit`."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..runs.settings import NoiseLevel
from ._errors import command
from .options import Alpha, BatchSize, Denoiser, NoiseResolution, check_source, is_name_of_callable

if TYPE_CHECKING:  # heavy: not for help
    from ..diagnostics.model_check import ModelCheck

app = typer.Typer()


@command(app)
def calibrate(
    count_head: Annotated[
        str,
        typer.Argument(callback=check_source, help="Folder of a count head. `calibration.json` is written into it."),
    ],
    run: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="Finished run of `certify-dataset --method fixed` on images not used to train the model or the head.",
        ),
    ],
) -> None:
    """
    Calibrate a count head: find how far its estimates must be lowered, or may be raised, so that most of them hold.

    Afterwards, use `--method surrogate --delta 0.05`. On average, its radii exceed those that draws prove for at most 5 % of
    images like those of the run: guarantee `marginal`. With `--radius` or `--radii`, it claims the largest possible one of
    these radii. This needs less lowering than claiming each image's own radius. Choose the radii before you see any results.

    The table shows how far the log-odds of p_A (the probability of the top class under noise) are lowered, or raised (below
    0), and how many images get a radius. `delta` is a share of all images: if few get a radius, many of these may be wrong.

    Example: `hf-smoothing calibrate my-counts runs/held-out`
    """
    from ..core.calibration import CALIBRATION_FILE
    from ..count_head.calibrate import calibrate_count_head, claim_rows
    from ..reporting.tables import print_table

    calibration = calibrate_count_head(count_head, run)
    title = "How far the log-odds of p_A are lowered (below 0: raised), and how many images get a radius"
    print_table(Console(), f"{title}; n = {calibration.n:,}", claim_rows(calibration), keys=2)
    typer.echo(f"Wrote {Path(count_head) / CALIBRATION_FILE}.")


@command(app)
def check(
    model: Annotated[
        str,
        typer.Argument(
            callback=check_source,
            help="Image classifier: a name on the Hub, a local folder, or `module:function` (a Python callable from [0, 1] "
            "pixels to logits, in the current folder or installed).",
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            callback=check_source, help="Labelled pictures to use. Without it: the 200 CIFAR-10 images in the package."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "test",
    sigma: Annotated[
        float | None,
        typer.Option(help="Noise level that you want to certify at, for pixels in `[0, 1]` (default: 0.12 to 1)."),
    ] = None,
    radii: Annotated[
        list[float] | None, typer.Option(help="Radii that you want to prove (default: none in particular).")
    ] = None,
    n: Annotated[int, typer.Option(help="Draws per image, from which the largest possible radius follows.")] = 100_000,
    alpha: Alpha = 0.001,
    images: Annotated[int, typer.Option(help="Number of pictures to look at.")] = 40,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Height and width of the pictures that a Python callable takes (default: those of the pictures)."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute, such as `cuda` (default: the CPU).")] = None,
    batch_size: BatchSize = 64,
    noise_resolution: NoiseResolution = "input",
    denoiser: Denoiser = None,
) -> None:
    """
    Check whether randomized smoothing suits a model: its predictions under noise, the largest radius that `n` draws can
    certify, and the causes of small or impossible certificates, each with its fix.

    Examples: `hf-smoothing check microsoft/resnet-18 --sigma 0.25 --radii 0.5`, `hf-smoothing check my_model:classify`
    """
    from ..core.noise import GaussianNoise
    from ..core.smoothing import SmoothedClassifier
    from ..core.validation import parse_noise_resolution
    from ..core.weights import loading
    from ..data.labelled_images import LabelledImages
    from ..diagnostics.model_check import check_model

    options: dict[str, Any] = {"device": device, "batch_size": batch_size, "denoiser": denoiser}
    noise = GaussianNoise(0.25)
    if is_name_of_callable(model):
        smoothed = SmoothedClassifier(_import_callable(model), noise, **options)
    else:
        options["noise_resolution"] = parse_noise_resolution(noise_resolution)
        with loading(model):
            smoothed = SmoothedClassifier.from_pretrained(model, noise, **options)
    data = None if dataset is None else LabelledImages(dataset, split=split)
    settings: dict[str, Any] = {"image_size": image_size, "sigma": sigma, "radii": radii or (), "count": images}
    _print_check(check_model(smoothed, data, n=n, alpha=alpha, **settings), n)


def _import_callable(name: str) -> Callable[..., Any]:
    """The callable `module:function`. Raises a `ValueError` where there is none."""
    module_name, _, path = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        value: Any = import_module(module_name)
        for attribute in path.split("."):
            value = getattr(value, attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The callable {name!r} cannot be imported: {error}.") from error
    if not callable(value):
        raise ValueError(f"{name!r} is a {type(value).__name__}, and no callable from pixels to logits.")
    return value


def _print_check(result: "ModelCheck", n: int) -> None:
    from ..core.certificates import format_radius
    from ..reporting.tables import print_table

    console = Console()
    rows = [
        {
            "sigma": f"{level['sigma']:g}",
            "predictions kept": f"{level['same_answer']:.0%}",
            "accuracy": "unknown" if level["accuracy"] is None else f"{level['accuracy']:.0%}",
            f"largest radius of {n:,} draws": format_radius(level["largest_radius"]),
        }
        for level in result.levels
    ]
    if rows:
        print_table(console, f"Noisy copies of {result.images} pictures", rows)
    if result.norm_layers:
        norms = ", ".join(f"{count} {kind}" for kind, count in result.norm_layers.items())
        console.print(f"Normalization layers: {norms}.", highlight=False)
    for number, fault in enumerate(result.all_faults, 1):
        console.print(f"{number}. {fault.cause}", highlight=False, markup=False)
        console.print(f"   Fix: {fault.fix}", highlight=False, markup=False)
    for sentence in filter(None, (result.omissions(), result.verdict())):
        console.print(sentence, highlight=False, markup=False)


@command(app)
def audit(
    run: Annotated[Path, typer.Argument(exists=True, help="Folder of a finished run.")],
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the results. Without it: `audit` in the folder of the run.")
    ] = None,
    images: Annotated[int, typer.Option(help="Certificates to attack at each noise level.")] = 100,
    sigma: Annotated[
        list[NoiseLevel] | None,
        typer.Option(
            parser=NoiseLevel,
            metavar="FLOAT|auto",
            help="Attack only these noise levels of the run (default: all). `auto`: the choice of the level and the class.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Gradient steps per image.")] = 1000,
    draws: Annotated[int, typer.Option(help="Noisy copies per gradient step.")] = 8,
    directions: Annotated[int, typer.Option(help="Random directions per image.")] = 20,
    reach: Annotated[float, typer.Option(help="Largest change to try, as a multiple of the radius.")] = 3.0,
    n: Annotated[int, typer.Option(help="New draws that check each candidate.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the attack.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute, such as `cuda`.")] = "cpu",
    batch_size: BatchSize = 128,
) -> None:
    """
    Attack the certificates of a run: look for a perturbation smaller than the radius that changes the prediction.

    Tries gradients of the smoothed classifier, random directions, and the direction to the nearest image of another class.
    New draws check every candidate; a change counts only if they prove it. The summary also shows how far beyond the radius
    predictions change.

    A violation is a wrong certificate; it is saved with everything needed to reproduce it. On average, at most a share alpha
    of the certificates is wrong. Each image takes about STEPS x DRAWS x 3 forward passes for the attack, and as many to
    check the candidates. You can interrupt the command: the same command resumes the audit. If the run names its model by a
    relative path, run the audit in the folder where the run was made.

    Example: `hf-smoothing audit runs/cifar10 --images 100`
    """
    from ..diagnostics.attacks import AttackSettings
    from ..diagnostics.audit import audit

    settings = AttackSettings(steps=steps, draws=draws, directions=directions, reach=reach, n=n, seed=seed)
    folder = output_dir or run / "audit"
    summary = audit(run, folder, settings, images=images, sigmas=sigma or (), device=device, batch_size=batch_size)
    for row in summary.violations:
        typer.echo(
            f"VIOLATED: image {row['index']} at sigma {row['sigma']}: certified {row['radius']:.4f}, changed at "
            f"{row['violation']['norm']:.4f} ({row['violation']['attack']}); see {folder / 'violations'}.",
            err=True,
        )
    typer.echo(summary)
    if summary.violations:
        raise typer.Exit(1)
