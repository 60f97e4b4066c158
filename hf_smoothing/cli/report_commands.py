"""The commands that write reports and model cards: `report` and `card`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ._errors import command
from .options import check_source

app = typer.Typer()

LogGuarantee = Annotated[
    str | None,
    typer.Option(
        help="Guarantee of the certificates in logs, which do not contain it: `per_input`, ... (default: unknown)"
    ),
]
LogAlpha = Annotated[
    float | None,
    typer.Option(
        help="Alpha of the certificates in logs, which do not contain it (default: unknown). Different ones are refused."
    ),
]
LogN = Annotated[
    list[int] | None,
    typer.Option(
        help="Counted draws of each image in logs, which do not contain it (default: unknown): one number for all logs, or "
        "one for each. With `--log-alpha` and a sigma in the file name (`sigma_0.25`), radii that these draws cannot prove "
        "are out of reach."
    ),
]
WriteLogs = Annotated[
    bool,
    typer.Option(
        "--write-logs",
        help="Also write each run and sigma as a log (`idx label predict radius correct time`), for scripts that read those "
        "of Cohen et al. A log does not contain guarantee, alpha and number of draws.",
    ),
]


@command(app)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            exists=True, help="Run folders, Parquet files of certificates, or logs (`idx label predict radius ...`)."
        ),
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report. Without it: the run folder if there is one run, otherwise `report`."
        ),
    ] = None,
    radii: Annotated[
        list[float] | None,
        typer.Option(help="Show accuracy at these radii. Without it: the radii that the runs decided, or 0 to 1."),
    ] = None,
    envelope: Annotated[
        bool,
        typer.Option(
            "--envelope", help="Add a row with the best result at each radius. It does not describe one classifier."
        ),
    ] = False,
    estimates: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Run with estimates of a count head (`surrogate`) for all images (default: none), where the other runs "
            "certified a random sample of them (`--max-samples`): the report is then about all images.",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            callback=check_source,
            help="Show example pictures of this dataset (default: none): a name on the Hub, a folder, or a Parquet file.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The split of `--images`. Without it: the one that the run certified.")
    ] = None,
    log_guarantee: LogGuarantee = None,
    log_alpha: LogAlpha = None,
    log_n: LogN = None,
    write_logs: WriteLogs = False,
) -> None:
    """
    Write tables and curves of certified accuracy from finished runs.

    Certified accuracy is the share of images with the right prediction and at least a given radius. This command prints the
    table, and writes `report.md`, `report.json` and pictures: certified accuracy against radius, how often the model is
    right under noise (p_A), the draws per image, and examples with `--images`.

    Example: `hf-smoothing report runs/cifar10 --envelope`
    """
    from ..reporting.report import print_report, write_report

    summary, folder = write_report(
        runs,
        output_dir,
        radii=radii,
        envelope=envelope,
        images=images,
        split=split,
        log_guarantee=log_guarantee,
        log_alpha=log_alpha,
        log_n=log_n or (),
        write_logs=write_logs,
        estimates=estimates,
    )
    console = Console()
    print_report(summary, console)
    written = ", ".join([str(folder / "report.md"), "report.json", *summary["logs"]])
    console.print(f"Wrote {written} and the pictures.", markup=False, soft_wrap=True)


@command(app)
def card(
    models: Annotated[
        list[Path], typer.Argument(exists=True, help="Folders of models, each with `card.yaml` and `results`.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail if a card differs from its results files.")
    ] = False,
    add_run: Annotated[
        Path | None,
        typer.Option(
            exists=True, help="Add the results of this finished run to the card of one model (default: none)."
        ),
    ] = None,
) -> None:
    """
    Write model cards from `card.yaml` (words) and results files (figures): `README.md` and pages of results.

    `--add-run` copies a run of `certify-dataset` to `results` of the model, writes its report, and shows it in the card.

    Example: `hf-smoothing card my-model --add-run runs/cifar10`
    """
    from ..hub.card_runs import add_run as add_run_to_card
    from ..hub.model_cards import check_card, write_card

    if add_run is not None and (check or len(models) > 1):
        raise ValueError("add_run adds to the card of one model: name one, without --check.")
    problems = []
    for folder in models:
        for path in [] if add_run is None else add_run_to_card(folder, add_run):
            typer.echo(f"Wrote {path}.")
        if check:
            problems += check_card(folder)
        for path in [] if check else write_card(folder):
            typer.echo(f"Wrote {path}.")
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
