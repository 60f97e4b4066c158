"""Auditing a run: attacking its certificates. No change smaller than a certified radius may change the prediction."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.progress_bar import open_bar
from ..core.smoothing import SmoothedClassifier
from ..core.validation import check_count
from ..data.labelled_images import ModelInputs
from ..reporting.rendering import format_count, format_number
from ..runs.identity import at_level, describe_classifier, load_classifier, open_images
from ..runs.records import level_of
from ..runs.run_folder import RunFolder
from ..runs.settings import NoiseLevel
from ..runs.time_estimate import SHORT_SECONDS, format_seconds, measure_seconds_per_draw
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions
from .attacks import AttackSettings, Attempt, Success, attack

_MAX_NEIGHBOURS = 200
"""Images among which the nearest image of another class is searched."""

Row = dict[str, Any]


@dataclass(frozen=True)
class AuditSummary:
    """The folder of an audit, a dict per certificate as in `audit.jsonl`, and the level of the certificates."""

    path: Path
    rows: list[Row]
    alpha: float

    @property
    def violations(self) -> list[Row]:
        return [row for row in self.rows if row["violation"] is not None]

    def summarize(self, sigma: NoiseLevel = None) -> Row:
        """Figures of the certificates at one noise level, or of all."""
        rows = [row for row in self.rows if sigma in (None, row["sigma"])]
        ratios = _relative_norms(rows)
        return {
            "sigma": sigma,
            "certificates": len(rows),
            "gradient_steps": sum(row["steps"] for row in rows),
            "candidates": sum(row["tried"] for row in rows),
            "violations": sum(row["violation"] is not None for row in rows),
            "changed_beyond": len(ratios),
            "least_norm_over_radius": min(ratios, default=None),
            "median_norm_over_radius": float(np.median(ratios)) if ratios else None,
        }

    def __str__(self) -> str:
        figures = self.summarize()
        text = (
            f"{format_count(len(self.rows), 'certificate')} attacked with "
            f"{format_count(figures['gradient_steps'], 'gradient step')} and "
            f"{format_count(figures['candidates'], 'candidate')}: {format_count(figures['violations'], 'violation')}. "
            f"At alpha = {self.alpha:g}, at most {len(self.rows) * self.alpha:.2g} of them are wrong on average."
        )
        if figures["changed_beyond"]:
            text += (
                f" Beyond the radius, the answer changed for {figures['changed_beyond']} of {len(self.rows)}, at "
                f"{figures['median_norm_over_radius']:.2f} times the radius in the median and "
                f"{figures['least_norm_over_radius']:.2f} times at least."
            )
        return f"{text} Details are in {self.path}."


def audit(
    run_dir: Path,
    output_dir: Path,
    settings: AttackSettings,
    *,
    images: int = 100,
    sigmas: Sequence[NoiseLevel] = (),
    device: str = "cpu",
    batch_size: int = 128,
) -> AuditSummary:
    """
    Attack random certificates of a finished run with a radius above 0, up to `images` at each of the noise levels `sigmas`
    (by default all of the run). Resumes an interrupted audit.

    Writes `audit.jsonl`, `audit.json` and, if there are any, `violations` into `output_dir`.

    Raises:
        ValueError: for a run that is unfinished, guarantees nothing, or was made with another model or other images; for a
            folder that holds an audit with other settings.
        OSError: if the folder cannot be written to.
    """
    check_count("images", images)
    folder = RunFolder(run_dir)
    run = folder.read_settings()
    if "model_weights" not in run:
        raise ValueError(f"{run_dir} does not say which weights were certified: audit a run of certify-dataset.")
    records = [record for record in folder.read_records() if record["error"] is None]
    sample = _sample_certificates(run_dir, run, records, images, sigmas, settings.seed)
    smoothed = _load_classifier(run, device, batch_size)
    inputs = open_images(run).bind(run["label_names"], smoothed.preprocessing)
    audit_settings = {
        **asdict(settings),
        "images": images,
        "sigmas": list(sigmas),
        "model_weights": run["model_weights"],
        "certificates": folder.table_digest(),
    }
    rows = _start(output_dir, audit_settings)
    finished = {(row["sigma"], row["index"]) for row in rows}
    classifiers = {level: at_level(smoothed, level, run) for level in dict.fromkeys(map(level_of, sample))}
    neighbours = _read_neighbours(records, inputs, settings.seed)
    _announce_time(smoothed, inputs[sample[0]["index"]][0], settings, len(sample) - len(finished))
    with (output_dir / "audit.jsonl").open("a") as lines:
        for record in open_bar(sample, "attacking"):
            if (level_of(record), record["index"]) in finished:
                continue
            pixels, _ = inputs[record["index"]]
            others = [
                _resize(neighbour, pixels)
                for index, label, neighbour in neighbours
                if label != record["prediction"] and index != record["index"]
            ]
            target = classifiers[level_of(record)]
            neighbour_pixels = torch.stack(others) if others else None
            attempt = attack(target, pixels, record["prediction"], record["radius"], settings, neighbour_pixels)
            if attempt.violation is not None:
                all_settings = {"run": run, "attack": asdict(settings)}
                _save_violation(output_dir, record, pixels, attempt.violation, all_settings)
            certificate = {"sigma": level_of(record)} | {name: record[name] for name in ("prediction", "radius")}
            rows.append({"index": record["index"]} | certificate | _to_row(attempt))
            lines.write(json.dumps(rows[-1]) + "\n")
            lines.flush()
    summary = AuditSummary(output_dir, rows, run["alpha"])
    _write_results(summary, audit_settings)
    return summary


def _announce_time(smoothed: SmoothedClassifier, pixels: torch.Tensor, settings: AttackSettings, images: int) -> None:
    """Print how long an audit will take, if it takes long."""
    passes = 6 * settings.steps * settings.draws  # a gradient costs about three, and its candidates as many
    seconds = images * passes * measure_seconds_per_draw(smoothed, pixels)
    if seconds > SHORT_SECONDS:
        certificates = format_count(images, "certificate")
        print(
            f"This takes about {format_seconds(seconds)}: the equivalent of {passes:,} forward passes for each of "
            f"{certificates}. `--images` and `--steps` make it shorter.",
            file=sys.stderr,
            flush=True,
        )


def _sample_certificates(
    run_dir: Path, run: Row, records: list[Row], images: int, sigmas: Sequence[NoiseLevel], seed: int
) -> list[Row]:
    """A random choice of certificates at each noise level, in order of their index."""
    certified = [record for record in records if record["prediction"] >= 0 and record["radius"] > 0]
    if guarantees := {record["guarantee"] for record in certified} - {"per_input"}:
        names = ", ".join(guarantees)
        raise ValueError(f"{run_dir} holds certificates of guarantee {names}: only per_input can be broken.")
    if unknown := set(sigmas) - set(run["sigmas"]):
        raise ValueError(f"{run_dir} holds nothing at sigma {', '.join(sorted(map(format_number, unknown)))}.")
    sample = []
    for sigma in sigmas or run["sigmas"]:
        candidates = [record for record in certified if level_of(record) == sigma]
        order = np.random.default_rng(seed).permutation(len(candidates))[:images]
        sample += [candidates[position] for position in sorted(order)]
    if not sample:
        raise ValueError(f"{run_dir} holds no certificate with a radius above 0.")
    return sample


def _read_neighbours(records: list[Row], inputs: ModelInputs, seed: int) -> list[tuple[int, int, torch.Tensor]]:
    """Index, true class and pixels of some random images of the run, certified or not."""
    labels = {record["index"]: record["label"] for record in records}
    indices = np.random.default_rng(seed).permutation(sorted(labels))[:_MAX_NEIGHBOURS]
    return [(int(index), labels[index], inputs[index][0]) for index in indices]


def _resize(pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if pixels.shape == target.shape:
        return pixels
    return nn.functional.interpolate(pixels[None], target.shape[1:], mode="bilinear", antialias=True)[0]


def _load_classifier(run: Row, device: str, batch_size: int) -> SmoothedClassifier:
    """The classifier of a run, checked to be the one that was certified."""
    smoothed = load_classifier({**run, "count_head": None}, device, batch_size)
    description = json.loads(json.dumps(describe_classifier(smoothed)))
    if differing := sorted(key for key, value in description.items() if key in run and run[key] != value):
        name, different = run["model_name_or_path"], ", ".join(differing)
        raise ValueError(f"The model {name!r} is not the one that was certified: it has another {different}.")
    return smoothed


def _start(output_dir: Path, settings: Row) -> list[Row]:
    """Start an audit in a folder, or resume the one there. Returns the finished rows."""
    output_dir.mkdir(parents=True, exist_ok=True)
    settings_path, lines_path = output_dir / "audit_settings.json", output_dir / "audit.jsonl"
    if not settings_path.exists():
        write_json(settings, settings_path)
    elif json.loads(settings_path.read_text()) != settings:
        raise ValueError(
            f"{output_dir} holds an audit with other settings, see {settings_path}: choose another folder."
        )
    text = lines_path.read_text() if lines_path.exists() else ""
    complete_lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    lines_path.write_text("".join(complete_lines))  # without a line that a kill cut off
    return [json.loads(line) for line in complete_lines]


def _to_row(attempt: Attempt) -> Row:
    def describe(success: Success | None) -> Row | None:
        return None if success is None else {name: getattr(success, name) for name in ("attack", "norm", "prediction")}

    row = {"tried": attempt.tried, "steps": attempt.steps}
    return row | {"violation": describe(attempt.violation), "smallest": describe(attempt.smallest)}


def _save_violation(output_dir: Path, record: Row, pixels: torch.Tensor, violation: Success, settings: Row) -> None:
    """Save everything that reproduces a violation: image, change, certificate, and all settings."""
    folder = output_dir / "violations"
    folder.mkdir(exist_ok=True)
    name = f"{record['index']}-sigma{format_number(level_of(record))}"
    np.savez(folder / f"{name}.npz", pixels=pixels.numpy(), change=violation.change.numpy())
    violation_row = {"norm": violation.norm, "prediction": violation.prediction, "attack": violation.attack}
    origin = {"settings": settings, "command": command_line(), "versions": package_versions()}
    write_json({"certificate": record, **violation_row, **origin}, folder / f"{name}.json")


def _write_results(summary: AuditSummary, settings: Row) -> None:
    results = {
        "command": command_line(),
        "settings": settings,
        "alpha": summary.alpha,
        "certificates": len(summary.rows),
        "violations": len(summary.violations),
        "by_sigma": [summary.summarize(sigma) for sigma in sorted({row["sigma"] for row in summary.rows}, key=str)],
        "versions": package_versions(),
    }
    write_json(results, summary.path / "audit.json")


def _relative_norms(rows: list[Row]) -> list[float]:
    """Norms of the successes beyond the radius, where certificates guarantee nothing, as multiples of the radius."""
    beyond = [row for row in rows if row["smallest"] is not None and row["violation"] is None]
    return [row["smallest"]["norm"] / row["radius"] for row in beyond]
