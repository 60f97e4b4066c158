"""The commands `hf-smoothing push` and `hf-smoothing pull`."""

from pathlib import Path
from typing import Annotated

import typer

from ..hub.push import list_push
from ..hub.push import pull as pull_repository
from ..hub.push import push as push_folder
from ._errors import fail

app = typer.Typer()

RepoId = Annotated[str, typer.Argument(help="Repository on the Hub: `user/name`.")]


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, a count head, or a finished run.")],
    repo_id: RepoId,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created where it is not there.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, with sizes in bytes, and send nothing.")
    ] = False,
) -> None:
    """
    Publish a model, a count head, or a finished run on the Hub.

    Models go with the code by which they load where this package is not installed (`trust_remote_code=True`); a run
    becomes a dataset repository for `load_dataset`. The token is that of `hf auth login`, or HF_TOKEN. When it fails on the
    way, the same command goes on.

    Example: `hf-smoothing push runs/cifar10 user/my-certificates --private`
    """
    try:
        if not dry_run:
            typer.echo(f"Published: {push_folder(folder, repo_id, private=private, revision=revision)}")
            return
        listing = list_push(folder, repo_id)
    except (OSError, ValueError) as error:
        fail(error)
    for path, size in listing.sizes.items():
        typer.echo(f"{size:>14,}  {path}")
    typer.echo(f"{sum(listing.sizes.values()):>14,}  bytes in all would go to the {listing.kind} repository {repo_id}")
    if listing.left_out:
        typer.echo(f"Left out: {', '.join(listing.left_out)}")


@app.command()
def pull(
    repo_id: RepoId,
    folder: Annotated[
        Path | None, typer.Argument(help="New folder to put it in; by default, the repository's name.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    repo_type: Annotated[
        str | None,
        typer.Option(help="`model` or `dataset`. Without it: a model, or a dataset where there is no such model."),
    ] = None,
) -> None:
    """
    Fetch a model, a count head, or a run from the Hub into a folder.

    Every file is checked against the checksum that the Hub lists; the folder appears once all of them are right.

    Example: `hf-smoothing pull user/my-certificates runs/cifar10`
    """
    try:
        found = pull_repository(repo_id, folder, kind=repo_type, revision=revision)
    except (OSError, ValueError) as error:
        fail(error)
    typer.echo(f"Wrote {found}.")
