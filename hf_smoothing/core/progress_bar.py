"""The progress bar of a certification."""

from collections.abc import Sequence

from tqdm.auto import tqdm


class ProgressBar:
    """
    Shows finished images, draws per second and the time left. An image in progress counts by the part of its budget used:
    `budget` is the most draws per image. `total` is the number of images, if known.
    """

    def __init__(self, total: int | None, budget: int):
        self.budget = budget
        self.finished = 0
        self.draws_of_finished = 0
        # without the bar's own counts: images in progress make them fractions
        counts = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}" if total else "{elapsed}"
        self.bar = tqdm(total=total, desc="certifying", bar_format="{desc} " + counts + "{postfix}")

    def update(self, finished: Sequence[int], in_progress: Sequence[int]) -> None:
        """Draws of each image that has finished since the last update, and so far of each image in progress."""
        self.finished += len(finished)
        self.draws_of_finished += sum(finished)
        elapsed = self.bar.format_dict["elapsed"] or 1e-9
        rate = (self.draws_of_finished + sum(in_progress)) / elapsed
        self.bar.set_postfix_str(f"{self.finished} images, {rate:.0f} draws/s", refresh=False)
        self.bar.update(self.finished + sum(in_progress) / self.budget - self.bar.n)

    def close(self) -> None:
        self.bar.close()
