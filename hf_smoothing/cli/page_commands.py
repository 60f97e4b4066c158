"""The command `hf-smoothing page`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ._errors import command
from .certify_commands import DEMO_MODEL
from .options import BatchSize

app = typer.Typer()


@command(app)
def page(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Image classifier: a name on the Hub or a local folder. Repeat it to let visitors choose among several.",
            show_default=DEMO_MODEL,
        ),
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, help="Folder of a finished run to show; repeat it for several. Without it: an example run."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute, such as `cuda`. Without it: the CPU.")] = None,
    batch_size: BatchSize = 64,
    host: Annotated[str, typer.Option(help="Address to serve at; `0.0.0.0` lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve at.")] = 7860,
) -> None:
    """
    Start a web page on this machine: certify a picture while you watch, try to break the claim, look at finished runs.

    The same page can be published as a Space, see `hf_smoothing/space/README.md`. The default model is in the repository:
    run this in a clone, or choose a model with `--model`.

    Example: `hf-smoothing page --model user/repo --run runs/cifar10`
    """
    if missing := [name for name in ("gradio", "matplotlib") if find_spec(name) is None]:
        raise ImportError(f"The page needs {' and '.join(missing)}: pip install 'hf-smoothing[space]'.")
    from ..space.page import PageSettings, build_page, launch_page

    settings = PageSettings(tuple(model or [DEMO_MODEL]), tuple(run or ()), device, batch_size)
    launch_page(build_page(settings), server_name=host, server_port=port)
