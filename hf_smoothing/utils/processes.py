"""The processes that a launcher started."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

Result = TypeVar("Result")


def start_processes(**options: Any) -> Accelerator:
    """The processes that `accelerate launch` or `torchrun` started, else one. Takes options of `Accelerator`."""
    accelerator = Accelerator(
        # without this, accelerate takes each of several processes on CPUs for the only one
        cpu=not torch.accelerator.is_available(),
        # a process may wait for another as long as one image takes; launchers end the others when one dies
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
        **options,
    )
    _notice_idle_cores(accelerator)
    return accelerator


def _notice_idle_cores(accelerator: Accelerator) -> None:
    """Say how to use all cores where `accelerate launch` leaves some idle: on CPUs it gives a process one thread."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = processes * torch.get_num_threads()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and accelerator.device.type == "cpu" and used < cores and accelerator.is_local_main_process:
        print(
            f"This computes on {used} of {cores} CPU cores. To use all of them: `accelerate launch "
            f"--num_cpu_threads_per_process {cores // processes} ...`.",
            file=sys.stderr,
        )


def on_main_first(accelerator: Accelerator, call: Callable[[], Result]) -> Result:
    """
    Call a function on the main process, and return its result on all processes.

    Raises:
        OSError, ValueError: on all processes, where the function raises it.
    """
    results: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            results = [call()]
        except (OSError, ValueError) as error:
            results = [error]
    broadcast_object_list(results)
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]
