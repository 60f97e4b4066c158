"""Real processes for the price of a fork.

A Python process takes about 7 seconds to import torch, transformers and the package. A [`ProcessServer`] imports them
once and forks a new process for each command, which then runs as `python ...` would: own environment, folder, output,
signals and exit status. Tests take the fixture `processes`:

    done = processes.run("scripts/certify.py", "--model_name_or_path", model, ...)
    assert done.returncode == 0, done.stderr

    process = processes.start("hf-smoothing", "certify-dataset", ...)
    os.kill(process.pid, signal.SIGINT)
    done = process.finish()

    for process in processes.start_ranks(2, "scripts/certify.py", ...):  # what torchrun starts
        assert process.finish().returncode == 0

What a library reads when it is imported (`HF_HUB_OFFLINE`, `HF_ENDPOINT`) must be set for the server, not for a command.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Process:
    """
    A command that a [`ProcessServer`] started, in a session (process group) of its own.

    Attributes:
        pid: of the process, for `os.kill` and `os.killpg`.
        returncode: as of `subprocess.Popen`; `None` while the process runs.
    """

    def __init__(self, command: list[str], status: int, output: list[Any]):
        self.command, self.returncode = command, None
        self._status, self._output = os.fdopen(status), output
        self.pid = int(self._status.readline() or 0)
        if not self.pid:
            raise RuntimeError("The process server has ended.")

    def poll(self, timeout: float = 0.0) -> int | None:
        """The exit status, or `None` where the process still runs after `timeout` seconds."""
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.readline() or -signal.SIGKILL)
            self._status.close()
        return self.returncode

    def kill(self) -> None:
        """Kill the process and those that it started (SIGKILL)."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def finish(self, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the process and read its output; a process that takes too long is killed."""
        if self.poll(timeout) is None:
            self.kill()
            self.poll(10)
            raise TimeoutError(f"{self.command} takes longer than {timeout} s.")
        texts = []
        for file in self._output:
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return subprocess.CompletedProcess(self.command, self.poll() or 0, *texts)


class ProcessServer:
    """
    Starts commands in new processes, forked from one that has imported the package.

    Args:
        environment: variables of the server and its processes, beside those of this process; `None` removes one.
    """

    def __init__(self, environment: Mapping[str, str | None] | None = None):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={name: value for name, value in variables.items() if value is not None},
                start_new_session=True,
            )

    def start(
        self, *command: Any, cwd: str | Path = ROOT, environment: Mapping[str, str | None] | None = None
    ) -> Process:
        """
        Start a command.

        Args:
            command: a script and its arguments; `-m` and a module; `-c` and code; or the name of an installed command
                (`hf-smoothing`, `accelerate`).
            cwd: the folder to run it in; the root of the repository by default.
            environment: variables to set or, where they are `None`, to remove.
        """
        words = [str(word) for word in command]
        request = {"command": words, "cwd": str(cwd), "environment": dict(environment or {})}
        output = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 (the process closes them)
        status, report = os.pipe()
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], [report, *map(_number, output)])
        finally:
            os.close(report)
        return Process(words, status, output)

    def run(self, *command: Any, timeout: float = 300.0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; see [`start`] for the arguments."""
        return self.start(*command, **options).finish(timeout)

    def start_ranks(
        self, num_processes: int, *command: Any, cwds: Sequence[str | Path] | None = None, **options: Any
    ) -> list[Process]:
        """
        Start a command in several processes of one group, with the variables that torchrun sets; in `cwds`, one folder for
        each process, if they differ.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        group |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
        environment = options.pop("environment", None) or {}
        return [
            self.start(
                *command,
                cwd=ROOT if cwds is None else cwds[rank],
                environment={**environment, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                **options,
            )
            for rank in range(num_processes)
        ]

    def close(self) -> None:
        """End the server, and kill what it started and still runs."""
        self._socket.close()
        self._server.wait(60)


def _number(file: Any) -> int:
    return file.fileno()


def _import_everything() -> None:
    """Import the package's modules and what they import only when they are used."""
    import hf_smoothing

    for module in pkgutil.walk_packages(hf_smoothing.__path__, "hf_smoothing."):
        if not module.name.endswith(("certified_accuracy.app", "space.app", "space.page")):  # these need gradio
            importlib.import_module(module.name)
    for name in ("accelerate", "datasets", "matplotlib.pyplot", "timm", "torch._dynamo", "transformers.pipelines"):
        importlib.import_module(name)


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; returns the request in each child, and `None` in the server when the client has gone."""
    running: dict[int, int] = {}
    while True:
        if select.select([requests], [], [], 0.005 if running else None)[0]:
            line, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
            if not line:
                break
            while not line.endswith(b"\n"):
                line += requests.recv(1 << 20)
            status, *output = files
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.write(status, b"%d\n" % os.getpid())
                for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *output]):
                    os.dup2(file, number)
                for file in (requests.fileno(), *files, *running.values()):
                    os.close(file)
                requests.detach()
                return json.loads(line)
            running[pid] = status
            for file in output:
                os.close(file)
        for pid, status in list(running.items()):
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                os.write(status, b"%d\n" % os.waitstatus_to_exitcode(code))
                os.close(running.pop(pid))
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
    return None


def _run(command: list[str], cwd: str, environment: dict[str, str | None]) -> None:
    """What `python` does with such a command line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    first, *rest = command
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = rest, cwd
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first.endswith(".py"):
        sys.argv, sys.path[0] = command, str(Path(first).absolute().parent)
        runpy.run_path(first, run_name="__main__")
    else:
        (script,) = entry_points(group="console_scripts", name=first)
        sys.argv = [str(Path(sys.executable).parent / first), *rest]
        sys.exit(script.load()())


def _end(error: BaseException | None) -> None:
    """End the process with the exit status and message of `error`, as Python does, but without tearing its modules down.

    That takes 3 seconds of CPU time, and shows nothing to the outside.
    """
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = str(ROOT)
    _import_everything()
    gc.freeze()  # what is there already is not collected in the forked processes
    if (request := _serve(requests)) is not None:
        try:
            _run(**request)
        except BaseException as error:
            _end(error)
        _end(None)


if __name__ == "__main__":
    main()
