"""Commands in processes of their own, against the server of the tests.

They are forked from one process that has imported the package, since the hub library reads its environment on import.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from .paths import ROOT


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Client:
    """
    A user of the Hub, with a home, a cache and a working folder of his own.

    Args:
        endpoint: of the server.
        home: an empty folder.
        token: `None` for a user who has not logged in.
    """

    def __init__(self, endpoint: str, home: Path, token: str | None):
        self.home, self.token = home, token
        self.environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the server speaks LFS
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        }
        self.folder = home / "folder"
        self.folder.mkdir()
        self.commands = 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["helpers.hub_client", "hf_smoothing.cli.app", "hf_smoothing.count_head.count_training"]
        )
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN_PATH"):
                patch.delenv(name, raising=False)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            forkserver.ensure_running()

    def __call__(self, *args: str | Path, token: str | None = "") -> Ended:
        """Run `hf-smoothing`, or a script where that is the first argument; with another token if one is given."""
        return self.call(_command, [str(one) for one in args], token=self.token if token == "" else token)

    def call(self, function: Callable[..., Any], *args: Any, token: str | None = None) -> Ended:
        """Call a function of a module in a process of its own."""
        self.commands += 1
        streams = [self.home / f"command-{self.commands}.{name}" for name in ("out", "err")]
        process = self.context.Process(target=_child, args=(function, args, token, self.folder, streams))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{args} takes longer than 120 s.")
        return Ended(process.exitcode, *(one.read_text() for one in streams))


def _child(function: Callable[..., Any], args: Any, token: str | None, folder: Path, streams: list[Path]) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.chdir(folder)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    function(*args)


def _command(args: list[str]) -> None:
    if args[0].endswith(".py"):
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")
        return
    from hf_smoothing.cli.app import app

    sys.argv = ["hf-smoothing", *args]
    app()
