"""Try to break the certificates of a finished run: none may fall to a change smaller than its radius."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..core.loading import loading
from ..core.noise import GaussianNoise
from ..core.smoothing import SmoothedClassifier
from ..core.validation import check_count
from ..data.labelled_images import ModelInputs
from ..runs.dataset_run import DTYPES
from ..runs.identity import describe_classifier, open_images
from ..runs.run_folder import RunFolder
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions
from .attacks import AttackSettings, Attempt, Success, attack

_NEIGHBOURS = 200
"""Images among which the nearest of another class is looked for."""


@dataclass(frozen=True)
class AuditSummary:
    """
    How an audit ended.

    Attributes:
        path: where everything is.
        rows: one dict a certificate, as in `audit.jsonl`.
        alpha: probability with which each certificate may be wrong, by chance.
    """

    path: Path
    rows: list[dict[str, Any]]
    alpha: float

    @property
    def violations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["violation"] is not None]

    def __str__(self) -> str:
        beyond = _beyond(self.rows)
        text = (
            f"{len(self.rows)} certificates attacked with {sum(row['steps'] for row in self.rows):,} gradient steps and "
            f"{sum(row['tried'] for row in self.rows):,} candidates: {len(self.violations)} violations (certificates "
            f"wrong by chance, at alpha = {self.alpha:g}: {len(self.rows) * self.alpha:.2g} at the most, on average)."
        )
        if beyond:
            text += (
                f" {len(beyond)} answers changed beyond their radius, at {np.median(beyond):.2f} times it in the median "
                f"({min(beyond):.2f} at the least)."
            )
        return f"{text} All of it is in {self.path}."


def audit(
    run_dir: Path,
    output_dir: Path,
    settings: AttackSettings,
    *,
    images: int = 100,
    sigmas: Sequence[float] = (),
    device: str = "cpu",
    batch_size: int = 128,
) -> AuditSummary:
    """
    Attack certificates of a run, chosen at random among those with a radius above 0; go on with an audit cut short.

    Args:
        run_dir: a finished run.
        output_dir: for `audit.jsonl`, `audit.json` and, should there be any, `violations`.
        settings: how hard to try.
        images: certificates to attack at each noise level.
        sigmas: these noise levels; by default, those of the run.
        device: where to compute.
        batch_size: draws in one forward pass.

    Raises:
        ValueError: for a run that is not finished, guarantees nothing or was made with another model or other images, or an
            audit with other settings in the folder.
        OSError: for a folder that cannot be written to.
    """
    check_count("images", images)
    folder = RunFolder(run_dir)
    run = folder.read_settings()
    if "model_weights" not in run:
        raise ValueError(f"{run_dir} does not say which weights were certified: audit a run of certify-dataset.")
    rows = [row for row in folder.read_records() if row["error"] is None]
    certified = [row for row in rows if row["prediction"] >= 0 and row["radius"] > 0]
    if kinds := {row["guarantee"] for row in certified} - {"per_input"}:
        raise ValueError(
            f"{run_dir} holds certificates of guarantee {', '.join(kinds)}: only per_input can be broken."
        )
    chosen = [row for sigma in sigmas or run["sigmas"] for row in _sample(certified, sigma, images, settings.seed)]
    if unknown := set(sigmas) - set(run["sigmas"]):
        raise ValueError(f"{run_dir} holds nothing at sigma {', '.join(f'{one:g}' for one in sorted(unknown))}.")
    if not chosen:
        raise ValueError(f"{run_dir} holds no certificate with a radius above 0.")
    smoothed = _load(run, device, batch_size)
    inputs = open_images(run).bind(run["label_names"], smoothed.preprocessing)
    certificates = folder.table_digest()
    identity = {
        **asdict(settings),
        "images": images,
        "sigmas": list(sigmas),
        "model_weights": run["model_weights"],
        "certificates": certificates,
    }
    found = list(_finished(output_dir, identity))
    done = {(row["sigma"], row["index"]) for row in found}
    neighbours = list(_neighbours(rows, inputs, settings.seed))
    with (output_dir / "audit.jsonl").open("a") as lines:
        for row in tqdm(chosen, "attacking"):
            if (row["sigma"], row["index"]) in done:
                continue
            pixels, _ = inputs[row["index"]]
            others = [
                _as_large(one, pixels)
                for index, label, one in neighbours
                if label != row["prediction"] and index != row["index"]
            ]
            attempt = attack(
                smoothed.with_noise(GaussianNoise(row["sigma"])),
                pixels,
                row["prediction"],
                row["radius"],
                settings,
                torch.stack(others) if others else None,
            )
            if attempt.violation is not None:
                _keep_violation(output_dir, row, pixels, attempt.violation, {"run": run, "attack": asdict(settings)})
            found.append({name: row[name] for name in ("index", "sigma", "prediction", "radius")} | _plain(attempt))
            lines.write(json.dumps(found[-1]) + "\n")
            lines.flush()
    summary = AuditSummary(output_dir, found, run["alpha"])
    write_json(
        {
            "command": command_line(),
            "settings": identity,
            "alpha": run["alpha"],
            "certificates": len(found),
            "violations": len(summary.violations),
            "by_sigma": [_by_sigma(found, sigma) for sigma in sorted({row["sigma"] for row in found})],
            "versions": package_versions(),
        },
        output_dir / "audit.json",
    )
    return summary


def _sample(rows: list[dict[str, Any]], sigma: float, images: int, seed: int) -> list[dict[str, Any]]:
    there = [row for row in rows if row["sigma"] == sigma]
    order = np.random.default_rng(seed).permutation(len(there))[:images]
    return [there[index] for index in sorted(order)]


def _neighbours(rows: list[dict[str, Any]], inputs: ModelInputs, seed: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Index, true class and pixels of some images of the run, whatever came of them."""
    labels = {row["index"]: row["label"] for row in rows}
    for index in np.random.default_rng(seed).permutation(sorted(labels))[:_NEIGHBOURS]:
        yield int(index), labels[index], inputs[index][0]


def _as_large(pixels: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if pixels.shape == other.shape:
        return pixels
    return nn.functional.interpolate(pixels[None], other.shape[1:], mode="bilinear", antialias=True)[0]


def _load(run: dict[str, Any], device: str, batch_size: int) -> SmoothedClassifier:
    name = run["model_name_or_path"]
    at = {name: run[name] for name in ("revision", "attn_implementation") if run.get(name) is not None}
    with loading(name):
        smoothed = SmoothedClassifier.from_pretrained(
            name,
            GaussianNoise(run["sigmas"][0]),
            batch_size=batch_size,
            device=device,
            autocast=DTYPES[run["dtype"]],
            noise_resolution=run.get("noise_resolution", "input"),
            denoiser=run.get("denoiser"),
            **at,
        )
    now = json.loads(json.dumps(describe_classifier(smoothed)))
    if other := sorted(one for one, value in now.items() if one in run and run[one] != value):
        raise ValueError(f"The model {name!r} is not the one that was certified: it has another {', '.join(other)}.")
    return smoothed


def _finished(output_dir: Path, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What an audit cut short has found already; begins a new one where there is none."""
    output_dir.mkdir(parents=True, exist_ok=True)
    settings, lines = output_dir / "audit_settings.json", output_dir / "audit.jsonl"
    if settings.exists():
        if json.loads(settings.read_text()) != identity:
            raise ValueError(
                f"{output_dir} holds an audit with other settings, see {settings}: choose another folder."
            )
    else:
        write_json(identity, settings)
    whole = [
        line for line in (lines.read_text() if lines.exists() else "").splitlines(keepends=True) if line.endswith("\n")
    ]
    lines.write_text("".join(whole))  # a line that a kill cut off is done again
    yield from map(json.loads, whole)


def _plain(attempt: Attempt) -> dict[str, Any]:
    def plain(success: Success | None) -> dict[str, Any] | None:
        if success is None:
            return None
        return {"attack": success.attack, "norm": success.norm, "prediction": success.prediction}

    return {
        "tried": attempt.tried,
        "steps": attempt.steps,
        "violation": plain(attempt.violation),
        "smallest": plain(attempt.smallest),
    }


def _keep_violation(
    output_dir: Path, row: dict[str, Any], pixels: torch.Tensor, found: Success, settings: dict[str, Any]
) -> None:
    """Everything needed to see it again: the picture, the change, the certificate, and what was certified and how judged."""
    folder = output_dir / "violations"
    folder.mkdir(exist_ok=True)
    name = f"{row['index']}-sigma{row['sigma']:g}"
    np.savez(folder / f"{name}.npz", pixels=pixels.numpy(), change=found.change.numpy())
    write_json(
        {
            "certificate": row,
            "norm": found.norm,
            "prediction": found.prediction,
            "attack": found.attack,
            "settings": settings,
            "command": command_line(),
            "versions": package_versions(),
        },
        folder / f"{name}.json",
    )


def _beyond(rows: list[dict[str, Any]]) -> list[float]:
    """How far off the answers change, in radii, where no certificate speaks any more."""
    return [
        row["smallest"]["norm"] / row["radius"]
        for row in rows
        if row["smallest"] is not None and row["violation"] is None
    ]


def _by_sigma(found: list[dict[str, Any]], sigma: float) -> dict[str, Any]:
    rows = [row for row in found if row["sigma"] == sigma]
    beyond = _beyond(rows)
    return {
        "sigma": sigma,
        "certificates": len(rows),
        "gradient_steps": sum(row["steps"] for row in rows),
        "candidates": sum(row["tried"] for row in rows),
        "violations": sum(row["violation"] is not None for row in rows),
        "changed_beyond": len(beyond),
        "least_norm_over_radius": min(beyond, default=None),
        "median_norm_over_radius": float(np.median(beyond)) if beyond else None,
    }
