"""A user of the Hub of the tests: commands in real processes, with a home of their own."""

import os
import shutil
from pathlib import Path
from subprocess import CompletedProcess

from .hub_server import READ_TOKEN, TOKEN
from .paths import ROOT
from .process_server import ProcessServer


class HubClient:
    """
    Runs commands as a user who has a token, a home (cache, stored token) and a working folder.

    Args:
        endpoint: of the server.
        home: an empty folder.
    """

    def __init__(self, endpoint: str, home: Path):
        self.home, self.folder = home, home / "folder"
        self.environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the server speaks LFS
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        others = dict.fromkeys(("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN_PATH"))
        self.processes = ProcessServer({**others, **self.environment})

    def reset(self) -> None:
        """Empty the home."""
        shutil.rmtree(self.home)
        self.folder.mkdir(parents=True)

    def __call__(self, *command: str | Path, token: str | None = TOKEN) -> CompletedProcess[str]:
        """Run `hf-smoothing` with arguments, or a script where that is the first one; without a token if it is `None`."""
        script = str(command[0]).endswith(".py")
        words = command if script else ("hf-smoothing", *command)
        done = self.processes.run(*words, cwd=self.folder, environment={"HF_TOKEN": token}, timeout=120)
        assert_no_token({"stdout": done.stdout.encode(), "stderr": done.stderr.encode()})
        return done

    def call(self, function: str, *arguments: str | Path) -> CompletedProcess[str]:
        """Run a function of `hub_user.py`, which uses the hub library itself."""
        return self(ROOT / "tests" / "helpers" / "hub_user.py", function, *arguments)


def read_files(folder: Path) -> dict[str, bytes]:
    """The content of each file of a folder, by its path in there."""
    paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_no_token(files: dict[str, bytes]) -> None:
    """Tokens must not be left anywhere."""
    for path, content in files.items():
        assert TOKEN.encode() not in content, path
        assert READ_TOKEN.encode() not in content, path


def error_lines(done: CompletedProcess[str]) -> list[str]:
    """What a command says is wrong."""
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]
