"""Model cards: a template, filled from `card.yaml` (words) and results files (figures)."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, StrictUndefined

from ..core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from .figures import KINDS

DESCRIPTION = "card.yaml"
EVAL_RESULTS = Path(".eval_results") / "certified-accuracy.yaml"
MEASURED = re.compile(
    r"\d[\d.,]*\s?(%|percent\b|points?\b|m?s\b|seconds?\b|minutes?\b|hours?\b)|(?<![\d.])0?\.(?!25\b|5\b|75\b|12\b)\d\d+\b",
    re.IGNORECASE,
)
"""What looks like a measured figure: shares, times, decimals other than usual noise levels and radii. Words have none."""


@dataclass(frozen=True)
class Section:
    """
    A part of a card: words, then what a results file says, then pictures.

    Args:
        title: its heading.
        text: Markdown, without figures.
        figure: how the results are shown, one of [`figures.KINDS`].
        results: the results file, from the model's folder.
        pictures: captions, and files from the model's folder.

    Raises:
        ValueError: for a figure of an unknown kind, or without a results file.
    """

    title: str
    text: str = ""
    figure: str | None = None
    results: str | None = None
    pictures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.figure is None) != (self.results is None):
            raise ValueError(f"section {self.title!r} takes both figure and results, or neither.")
        if self.figure is not None and self.figure not in KINDS:
            raise ValueError(f"section {self.title!r}: figure={self.figure!r} is none of {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Description:
    """
    What `card.yaml` holds: the words of a card.

    Args:
        summary: what the model is, in a paragraph of Markdown.
        datasets: names on the Hub of what it was trained on.
        example: a picture for the example, or none for a model that is only to be finetuned.
        sigma: noise level of the example, in `[0, 1]` pixels.
        base_model: what it was finetuned from, if anything.
        sections: what was measured.
        training: words on the training, besides what `results/training.json` says.
        sources: papers and data.
    """

    summary: str
    datasets: list[str]
    sources: list[str]
    sections: list[Section]
    example: str | None = None
    sigma: float = 0.25
    base_model: str | None = None
    training: str = ""


def read_description(folder: Path) -> Description:
    """
    The words of a card.

    Args:
        folder: the model's.

    Raises:
        ValueError: for a file that is missing or damaged, unknown or missing keys, or words with measured figures in them.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {DESCRIPTION}: it holds the words of the card, see model_cards/ for examples."
        )
    try:
        found = yaml.safe_load(path.read_text())
        sections = [Section(**section) for section in found.pop("sections", [])]
        description = Description(sections=sections, **found)
    except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        names = ", ".join(one.name for one in fields(Description))
        raise ValueError(f"{path} is no description of a card ({names}): {error}") from error
    for words in _words(description):
        if measured := MEASURED.search(words):
            raise ValueError(
                f"{path}: the figure {measured[0]!r} has no results file behind it. Name the file in a section instead."
            )
    return description


def _words(description: Description) -> Iterator[str]:
    yield description.summary
    yield description.training
    for section in description.sections:
        yield section.title
        yield section.text
        yield from section.pictures


def render(folder: Path) -> dict[Path, str]:
    """
    What the card's files should hold.

    Args:
        folder: the model's.

    Returns:
        Text by file, from the folder: `README.md`, and `.eval_results/certified-accuracy.yaml` where there are certificates.

    Raises:
        ValueError: as [`read_description`], for a results file or picture that is missing or damaged.
    """
    description = read_description(folder)
    shown = []
    for section in description.sections:
        for picture in section.pictures.values():
            if not (folder / picture).is_file():
                raise ValueError(f"{folder / DESCRIPTION}: the picture {picture!r} is not there.")
        figures = None if section.figure is None else KINDS[section.figure](_results(folder, section.results))
        shown.append((section, figures))
    config = _results(folder, "config.json")
    own = config["model_type"] == MixedNoiseViTConfig.model_type
    training = KINDS["training"](_results(folder, "results/training.json"))
    entries = list(_certified(folder, description))
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["randomized-smoothing", "certified-robustness", *(["mixed-noise-vit"] if own else [])],
        datasets=description.datasets or None,
        base_model=description.base_model,
        model_name=folder.resolve().name,
        eval_results=[_eval_result(*entry) for entry in entries] or None,
    )
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    template = environment.from_string((files(__package__) / "templates/model_card.md.jinja").read_text())
    text = template.render(
        metadata=metadata.to_yaml(),
        name=folder.resolve().name,
        description=description,
        sections=shown,
        size=config.get("image_size"),
        own=own,
        counts=config.get("count_sigmas"),
        training=training,
    )
    found = {Path("README.md"): text}
    if entries:
        found[EVAL_RESULTS] = yaml.safe_dump(
            eval_result_entries_to_yaml([_entry(*entry) for entry in entries]), sort_keys=False
        )
    return found


def write(folder: Path) -> list[Path]:
    """Write a card's files, as [`render`] would have them, and take away what has nothing behind it; those that changed."""
    changed = []
    found = render(folder)
    if EVAL_RESULTS not in found and (folder / EVAL_RESULTS).is_file():
        (folder / EVAL_RESULTS).unlink()
        changed.append(folder / EVAL_RESULTS)
    for name, text in found.items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            changed.append(path)
    return changed


def begin(
    folder: Path, *, summary: str, dataset: str, base_model: str | None = None, sources: Sequence[str] = ()
) -> None:
    """
    Give a model just trained a card to go on from; one that is there keeps its words.

    Args:
        folder: the model's, with `results/training.json`.
        summary: what it is, in a sentence.
        dataset: what it was trained on. The metadata name it if it is one of the Hub.
        base_model: what it was trained from, likewise.
        sources: papers that it rests on, besides those that all models here do.
    """
    if not (folder / DESCRIPTION).is_file():
        words: dict[str, Any] = {
            "summary": summary,
            "datasets": [dataset] if _on_the_hub(dataset) else [],
            "sections": [],
            "sources": [
                *sources,
                "Exploring Transferability for Randomized Smoothing (arXiv 2312.09020)",
                "Certified Adversarial Robustness via Randomized Smoothing (arXiv 1902.02918)",
            ],
        }
        if base_model is not None and _on_the_hub(base_model):
            words["base_model"] = base_model
        (folder / DESCRIPTION).write_text(yaml.safe_dump(words, sort_keys=False, width=140))
    write(folder)


def _on_the_hub(name: str) -> bool:
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return is_name and Path(name).suffix != ".parquet" and not Path(name).exists()


def check(folder: Path) -> list[str]:
    """What in a card's files is not what the results files say, a line each."""
    found = render(folder)
    problems = []
    if EVAL_RESULTS not in found and (folder / EVAL_RESULTS).is_file():
        problems.append(f"{folder / EVAL_RESULTS}: no certificate is behind any of it.")
    for name, text in found.items():
        path = folder / name
        there = path.read_text().splitlines() if path.is_file() else []
        matcher = difflib.SequenceMatcher(None, there, text.splitlines(), autojunk=False)
        for kind, first, _, _, _ in matcher.get_opcodes():
            if kind == "insert":
                problems.append(f"{path}, line {first + 1}: something is missing that the results files say.")
            elif kind != "equal":
                line = there[first].strip()
                shown = line if len(line) < 200 else line[:200] + " ..."
                problems.append(f"{path}, line {first + 1}: no results file has this behind it: {shown}")
    return problems


def _results(folder: Path, name: str | None) -> dict[str, Any]:
    path = folder / str(name)
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read, but the card needs it: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no results.")
    return found


def _certified(folder: Path, description: Description) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Run and share of everything certified in this model's own reports that was counted."""
    for section in description.sections:
        if section.figure != "report":
            continue
        for entry in _results(folder, section.results)["results"]:
            if entry["model"] is None or Path(entry["model"]).name != folder.resolve().name:
                continue  # beside this model a card may show another
            if entry["guarantee"] not in ("per_input", "marginal"):
                continue  # an estimate is no certificate
            if not _on_the_hub(entry["made_by"]["settings"]["dataset_name"]):
                continue  # a file of ours, or of somebody's, means nothing to others
            yield from ((entry, share) for share in entry["certified_accuracy"] if share["standing"] == "counted")


def _arguments(entry: dict[str, Any], share: dict[str, Any]) -> dict[str, Any]:
    settings = entry["made_by"]["settings"]
    return {
        "radius": share["radius"],
        "sigma": entry["sigma"],
        "norm": "l2",
        "alpha": entry["alpha"],
        "guarantee": entry["guarantee"],
        "method": settings["method"],
        "n": settings["n"] or settings["max_draws"],
        "every": settings["every"],
        "dtype": settings["dtype"],
        "noise_resolution": str(settings.get("noise_resolution", "input")),
        **{name: settings[name] for name in ("delta", "denoiser") if settings.get(name) is not None},
        # how far a calibrated head is lowered or raised depends on them
        **({"radii": entry["decided_radii"]} if settings.get("delta") is not None and entry["decided_radii"] else {}),
    }


def _eval_result(entry: dict[str, Any], share: dict[str, Any]) -> EvalResult:
    settings = entry["made_by"]["settings"]
    return EvalResult(
        task_type="image-classification",
        dataset_type=settings["dataset_name"],
        dataset_name=settings["dataset_name"],
        dataset_split=settings["split"],
        metric_type="certified_accuracy",
        metric_name=f"Certified accuracy at r = {share['radius']:g}, sigma = {entry['sigma']:g}",
        metric_value=share["share"],
        metric_args=_arguments(entry, share),
    )


def _entry(entry: dict[str, Any], share: dict[str, Any]) -> EvalResultEntry:
    arguments = _arguments(entry, share)
    return EvalResultEntry(
        dataset_id=entry["made_by"]["settings"]["dataset_name"],
        task_id=f"certified_accuracy_r{share['radius']:g}_sigma{entry['sigma']:g}_n{arguments['n']}",
        value=share["share"],
        notes=", ".join(f"{name}: {value}" for name, value in arguments.items()),
    )
