"""The command `hf-smoothing`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import pipeline

from ..core.certificates import format_radius
from ..core.loading import loading
from ..core.preprocessing import read_resolution
from ..reporting.report import print_report, write_report
from ..reporting.tables import print_table
from ..runs import dataset_run as dataset_runs
from ..runs.dataset_run import RunSettings
from ..utils.processes import start_processes
from . import hub_commands, model_commands
from ._errors import fail
from .demo import run_demo
from .options import Alpha, BatchSize, CountHead, Delta, Denoiser, Method, Model, NoiseResolution, Seed, Sigma

app = typer.Typer(
    no_args_is_help=True,
    # --image_column as well, which is what the scripts call it, and what errors say
    context_settings={"token_normalize_func": lambda flag: flag.replace("_", "-")},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Certified robustness for image classifiers, by randomized smoothing.",
)
app.add_typer(model_commands.app)
app.add_typer(hub_commands.app)

DEMO_MODEL = "model_cards/mixed-noise-vit-nano-cifar10"


@app.command()
def certify(
    images: Annotated[list[str], typer.Argument(help="Pictures: paths or http(s) addresses.")],
    model: Model,
    sigma: Sigma = 0.25,
    alpha: Alpha = 0.001,
    radius: Annotated[
        float | None,
        typer.Option(
            help="Decide this radius and stop once it is settled. Without it the radius is found. (`surrogate`: with "
            "`--delta`, to claim this radius or nothing.)"
        ),
    ] = None,
    max_draws: Annotated[int | None, typer.Option(help="The most draws for one picture.")] = None,
    method: Method = "sequential",
    count_head: CountHead = None,
    delta: Delta = None,
    noise_resolution: NoiseResolution = "input",
    denoiser: Denoiser = None,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a picture instead of a table.")
    ] = False,
) -> None:
    """
    Certify pictures: print for each the answer, and the radius within which nothing changes it.

    The radius is an l2 distance of `[0, 1]` pixels, at the size at which the model sees the picture unless
    `--noise-resolution` says otherwise; rounded down.

    Example: `hf-smoothing certify frog.png --model user/repo --sigma 0.5`
    """
    settings = {"alpha": alpha, "radius": radius, "max_draws": max_draws, "method": method, "seed": seed}
    settings |= {"count_head": count_head, "delta": delta, "denoiser": denoiser}
    settings["noise_resolution"] = read_resolution(noise_resolution)
    try:
        with loading(model):
            pipe = pipeline(
                "certified-image-classification", model=model, sigma=sigma, batch_size=batch_size, dtype=torch.float32
            )
        found = pipe(images, progress=sys.stderr.isatty(), **{k: v for k, v in settings.items() if v is not None})
    except (OSError, TypeError, ValueError) as error:
        fail(error)
    if json_lines:
        for name, result in zip(images, found):
            print(json.dumps({"image": name, **result}))
        return
    rows = [
        {
            "image": name,
            "prediction": result["label"] or "(abstains)",
            "radius": format_radius(result["radius"]),
            "draws": result["num_samples"],
            "guarantee": result["guarantee"],
        }
        for name, result in zip(images, found)
    ]
    at = "of the model's input" if noise_resolution == "input" else f"at resolution {noise_resolution}"
    behind = "" if denoiser is None else f", {denoiser} in front of the model"
    about = sorted({f", delta = {one['delta']:g} ({one['calibration']})" for one in found if one["delta"] is not None})
    title = f"sigma = {sigma:g}, alpha = {alpha:g}{''.join(about)}, l2 radius in [0, 1] pixels {at}{behind}"
    print_table(Console(), title, rows)


@app.command()
def certify_dataset(
    model: Model,
    dataset: Annotated[
        str,
        typer.Option(
            help="What `load_dataset` takes: a name on the Hub, a local folder (pictures too); or a Parquet file."
        ),
    ],
    sigma: Annotated[
        list[float],
        typer.Option(help="Noise level, in [0, 1] pixels. Repeat it for several: `--sigma 0.25 --sigma 0.5`."),
    ],
    output_dir: Annotated[Path, typer.Option(help="A new folder, or one with a run to go on with.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the model: a branch, tag or commit.")] = None,
    dataset_config_name: Annotated[str | None, typer.Option(help="Configuration of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "test",
    image_column: Annotated[str | None, typer.Option(help="Column of the images, if not `img` or `image`.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the labels, if not `label`, `labels` or `fine_label`.")
    ] = None,
    every: Annotated[
        int, typer.Option(help="Certify every this many images, from the first on. 20 is usual for CIFAR-10.")
    ] = 1,
    max_samples: Annotated[int | None, typer.Option(help="Certify no more images than this.")] = None,
    streaming: Annotated[bool, typer.Option(help="Read the dataset as a stream, without storing it.")] = False,
    radii: Annotated[
        list[float] | None,
        typer.Option(
            help="Decide this radius; repeat it for several. Without it each image's radius is found. (`surrogate`: with "
            "`--delta`, to claim the largest of them that can be.)"
        ),
    ] = None,
    method: Method = "sequential",
    alpha: Alpha = 0.001,
    max_draws: Annotated[int | None, typer.Option(help="The most draws for one image.")] = None,
    n0: Annotated[int | None, typer.Option(help="Draws that choose the class (`fixed`).")] = None,
    n: Annotated[
        int | None, typer.Option(help="Draws that bound its probability (`fixed`), or are counted (`counts`).")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Relative tolerance of the radius (`sequential` without radii).")
    ] = None,
    count_head: CountHead = None,
    delta: Delta = None,
    noise_resolution: NoiseResolution = "input",
    denoiser: Denoiser = None,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="Forward passes in `float32`, or in `bfloat16` (autocast).")] = "float32",
    batch_size: BatchSize = 128,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the output folder if there is one.")] = True,
) -> None:
    """
    Certify the images of a dataset: one row an image and sigma in `OUTPUT_DIR/certificates.parquet`.

    Interrupt it when you like: the same command goes on where it stopped. For several processes or devices use
    `accelerate launch scripts/certify.py`, which does the same.

    Example: `hf-smoothing certify-dataset --model user/repo --dataset uoft-cs/cifar10 --every 20 --sigma 0.25
    --output-dir runs/cifar10`
    """
    try:
        settings = RunSettings(
            model_name_or_path=model,
            dataset_name=dataset,
            sigmas=tuple(sigma),
            dataset_config_name=dataset_config_name,
            split=split,
            revision=revision,
            image_column=image_column,
            label_column=label_column,
            every=every,
            max_samples=max_samples,
            radii=tuple(radii) if radii else None,
            method=method,
            alpha=alpha,
            max_draws=max_draws,
            n0=n0,
            n=n,
            tolerance=tolerance,
            seed=seed,
            dtype=dtype,
            count_head=count_head,
            delta=delta,
            noise_resolution=read_resolution(noise_resolution),
            denoiser=denoiser,
        )
        summary = dataset_runs.certify_dataset(
            settings,
            output_dir,
            accelerator=start_processes(),
            batch_size=batch_size,
            streaming=streaming,
            resume=resume,
        )
    except KeyboardInterrupt as error:
        typer.echo(f"\n{error}" if error.args else "\nstopped", err=True)
        raise typer.Exit(130) from None
    except (OSError, RuntimeError, ValueError) as error:
        fail(error)
    typer.echo(summary)


@app.command()
def demo(
    model: Model = DEMO_MODEL,
    output_dir: Annotated[
        Path, typer.Option(help="Where to write certificates.parquet, run.json and certificates.png.")
    ] = Path("demo"),
    sigma: Sigma = 0.25,
    alpha: Alpha = 0.001,
    max_draws: Annotated[int, typer.Option(help="The most draws for one picture.")] = 450,
    count_head: Annotated[
        str | None,
        typer.Option(
            help="A count head, to draw less. By default the one in the folder MODEL-counts, if there is one."
        ),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
) -> None:
    """
    Certify the 200 CIFAR-10 test images that ship with the package, and show what comes out.

    Run it in a clone of the repository, where the model is, or name a model with `--model`.
    """
    try:
        run_demo(model, output_dir, sigma, alpha, max_draws, seed, batch_size, count_head)
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, Parquet files of certificates, or logs (`idx label predict radius ...`)."),
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where to write. Without it: the run folder if there is one run, else `report`."),
    ] = None,
    radii: Annotated[
        list[float] | None,
        typer.Option(help="Count at this radius; repeat it for several. Without it: at those the runs decided."),
    ] = None,
    envelope: Annotated[
        bool, typer.Option("--envelope", help="Add the best of all rows at each radius, labelled as what it is.")
    ] = False,
    images: Annotated[
        str | None,
        typer.Option(help="Show pictures of this dataset: a `load_dataset` name, a folder, a Parquet file."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The split of `--images`. Without it: the one that the run certified.")
    ] = None,
    log_guarantee: Annotated[
        str | None,
        typer.Option(help="What the certificates in logs carry, which a log does not say: `per_input`, ..."),
    ] = None,
) -> None:
    """
    Tables and curves of certified accuracy from finished runs.

    Prints the table, and writes `report.md`, `report.json` and the pictures: certified accuracy against radius, the
    distribution of p_A, the draws spent, and examples with `--images`.

    Example: `hf-smoothing report runs/cifar10 --envelope`
    """
    try:
        summary, folder = write_report(
            runs,
            output_dir,
            radii=radii,
            envelope=envelope,
            images=images,
            split=split,
            log_guarantee=log_guarantee,
        )
    except (ImportError, OSError, TypeError, ValueError) as error:
        fail(error)
    console = Console()
    print_report(summary, console)
    console.print(f"Wrote {folder / 'report.md'}, report.json and the pictures.", markup=False, soft_wrap=True)
