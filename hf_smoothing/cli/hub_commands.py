"""The command `hf-smoothing push`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._errors import command

app = typer.Typer()


@command(app)
def push(
    folder: Annotated[Path, typer.Argument(exists=True, help="Folder of a model, a count head, or a finished run.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: `user/name`.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to (default: main). It is created if it does not exist.")
    ] = None,
    allow_unfinished: Annotated[
        bool, typer.Option("--allow-unfinished", help="Publish a model although its training was cut short.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files that would be uploaded, with their sizes in bytes.")
    ] = False,
) -> None:
    """
    Publish a model, a count head, or a finished run on the Hub.

    A model is uploaded with its code, so it also loads without this package (`trust_remote_code=True`). A
    run becomes a dataset repository for `load_dataset`. Log in first with `hf auth login`, or set HF_TOKEN. After an
    interruption, run the same command again.

    Example: `hf-smoothing push runs/cifar10 user/my-certificates --private`
    """
    from ..hub.push import plan_push
    from ..hub.push import push as push_folder

    if not dry_run:
        options: dict[str, Any] = {"private": private, "revision": revision, "allow_unfinished": allow_unfinished}
        typer.echo(f"Published: {push_folder(folder, repo_id, **options)}")
        return
    plan = plan_push(folder, repo_id, allow_unfinished=allow_unfinished)
    for path, size in plan.sizes.items():
        typer.echo(f"{size:>14,}  {path}")
    typer.echo(f"{sum(plan.sizes.values()):>14,}  bytes in total for the {plan.repo_type} repository {repo_id}")
    if plan.skipped:
        typer.echo(f"Not uploaded: {', '.join(plan.skipped)}")
