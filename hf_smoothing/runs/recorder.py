"""What a process keeps of its work, and the progress bar of a run."""

import time
from collections import Counter

from accelerate import Accelerator

from ..core.progress_bar import open_bar
from .records import Record, is_right, level_of
from .run_folder import RunFolder, RunState
from .settings import NoiseLevel, RunSettings
from .work_queue import REFRESH_SECONDS, WorkQueue

_WORDS = {"counts": ("counting", None), "surrogate": ("estimating", "claimed")}
"""By method, where the result is no certificate: what the bar says it does, and what it calls a right image."""


class Recorder:
    """
    Keeps the records of a process: in its shard, and in the counts that all processes share. On the main process, a bar
    shows images done, draws per second, certified or claimed accuracy so far, and time left.

    Args:
        folder: of the run.
        state: where the run stands at its start.
        settings: of the run.
        accelerator: the processes.
        expected: number of records at the end, if it is known.
    """

    def __init__(
        self, folder: RunFolder, state: RunState, settings: RunSettings, accelerator: Accelerator, expected: int | None
    ):
        self.queue = WorkQueue(accelerator, state.start)
        self.writer = folder.open_shard(accelerator.process_index)
        self.settings, self.is_main_process = settings, accelerator.is_main_process
        self.done_before = Counter(sigma for sigma, _ in state.finished)
        self.right_before = Counter(sigma for (sigma, _), right in state.finished.items() if right)
        verb, self.participle = _WORDS.get(str(settings.method), ("certifying", "certified"))
        total = expected or (settings.max_samples and settings.max_samples * len(settings.sigmas))
        before, hidden = len(state.finished), not self.is_main_process
        # smoothing 0: images differ in cost, so the mean rate predicts the time left best
        self.bar = open_bar(desc=verb, total=total, initial=before, unit="image", smoothing=0, disable=hidden)
        self.started = self.shown = self.last = time.monotonic()

    def keep(self, row: Record) -> None:
        """Write a record as soon as it is there."""
        now = time.monotonic()
        row["seconds"], self.last = now - self.last, now
        self.writer.write(row)
        self.queue.count(level_of(row), is_right(row, self.settings.smallest_radius), row["num_samples"])
        self._show(level_of(row))

    def finish(self) -> None:
        """Say that this process has no work left; the main process waits for the others."""
        self.queue.finish()
        while self.is_main_process and not self.queue.all_finished():
            self._show(self.settings.sigmas[-1])
            time.sleep(0.05)
        self._show(self.settings.sigmas[-1], at_once=True)

    def close(self) -> None:
        self.bar.close()
        self.writer.close()

    def _show(self, sigma: NoiseLevel, at_once: bool = False) -> None:
        """Show the progress of all processes and the accuracy at `sigma`; unless `at_once`, only now and then."""
        now = time.monotonic()
        if not self.is_main_process or (now - self.shown < REFRESH_SECONDS and not at_once):
            return
        self.shown = now
        done = {level: self.done_before[level] + self.queue.total(f"images {level}") for level in self.settings.sigmas}
        text = f"{self.queue.total('draws') / (now - self.started):.0f} draws/s"
        if self.participle:
            right = self.right_before[sigma] + self.queue.total(f"right {sigma}")
            at = f"at radius {self.settings.smallest_radius:g} (sigma {sigma})"
            text += f", {right / max(done[sigma], 1):.1%} {self.participle} {at}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(sum(done.values()) - self.bar.n)
