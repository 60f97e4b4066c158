"""Model cards: templates, filled from `card.yaml` (words) and results files (figures)."""

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from jinja2 import UndefinedError

from ..core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from ..reporting.rendering import render
from ..reporting.results import name_of_figure
from .card_metadata import card_metadata, certified_points, eval_results
from .results_pages import TEMPLATES, Json, render_accuracy, render_results

WORDS = "card.yaml"
EVAL_RESULTS = Path(".eval_results") / "certified-accuracy.yaml"
TRAINING = "results/training.json"


@dataclass(frozen=True)
class Picture:
    """
    A picture of a card.

    Args:
        file: its path from the folder of the model.
        caption: what it shows.
    """

    file: str
    caption: str


@dataclass(frozen=True)
class Page:
    """
    A page of results that the card links to.

    Args:
        title: its heading.
        file: the page, a Markdown file, as a path from the folder of the model.
        template: how the results are shown, see [`render_results`]. A `report` has no other words than its own.
        results: the results file, as a path from the folder of the model.
        summary: what the card says of it.
        text: Markdown before the figures.
        pictures: captions, and files as paths from the folder of the model.
    """

    title: str
    file: str
    template: str
    results: str
    summary: str = ""
    text: str = ""
    pictures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Words:
    """
    What `card.yaml` holds: the words of a card, and which results files its figures come from.

    Args:
        summary: what the model is, in two or three sentences of Markdown.
        tagline: the same in a few words, for a table of models.
        datasets: names on the Hub of what it was trained on.
        sources: papers and data, in Markdown. The Hub lists the model on the page of each paper that is linked
            (`https://arxiv.org/abs/...`).
        picture: the one picture of the card.
        accuracy: the table of the card: results files by what they are about. A `report.json`, or the study of a count head.
        sigma: noise level of the example, in `[0, 1]` pixels.
        finetune_first: whether the model is a foundation to finetune, not a classifier to use.
        base_model: the name on the Hub of what it was trained from, if any.
        training: words on the training, besides what `results/training.json` holds.
        pages: all other results.
    """

    summary: str
    datasets: list[str]
    sources: list[str]
    tagline: str = ""
    picture: Picture | None = None
    accuracy: dict[str, str] = field(default_factory=dict)
    sigma: float = 0.25
    finetune_first: bool = False
    base_model: str | None = None
    training: str = ""
    pages: list[Page] = field(default_factory=list)


def read_words(folder: Path) -> Words:
    """
    The words of a card.

    Args:
        folder: of the model.

    Raises:
        ValueError: for a file that is missing or damaged, unknown or missing keys, or a picture that does not exist.
    """
    path = folder / WORDS
    if not path.is_file():
        raise ValueError(f"{folder} has no {WORDS}: it holds the words of the card, see model_cards/ for examples.")
    try:
        content = yaml.safe_load(path.read_text())
        pages = [Page(**page) for page in content.pop("pages", [])]
        picture = content.pop("picture", None)
        words = Words(pages=pages, picture=picture and Picture(**picture), **content)
    except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        names = ", ".join(known.name for known in fields(Words))
        raise ValueError(f"{path} is not a description of a card ({names}): {error}") from error
    pictures = [file for page in pages for file in page.pictures.values()]
    for file in pictures + ([words.picture.file] if words.picture else []):
        if not (folder / file).is_file():
            raise ValueError(f"{path}: there is no picture {file!r}.")
    return words


@dataclass(frozen=True)
class Card:
    """
    The data of a card.

    Attributes:
        folder: of the model.
        words: from `card.yaml`.
        config: the content of `config.json`.
        training: the content of `results/training.json`.
        accuracy: the content of the results files of the card's table, by label.
        points: the certified accuracy of this model at each radius, see [`certified_points`].
    """

    folder: Path
    words: Words
    config: Json
    training: Json
    accuracy: dict[str, Json]
    points: list[Json]

    @property
    def is_count_head(self) -> bool:
        """Whether the model predicts counts, and is no classifier."""
        return bool(self.config.get("count_sigmas"))

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.folder.resolve().name


def read_card(folder: Path) -> Card:
    """
    The data of a card.

    Args:
        folder: of the model.

    Raises:
        ValueError: as [`read_words`]; for a results file that is missing or damaged.
    """
    words, config = read_words(folder), _read_json(folder, "config.json")
    accuracy = {label: _read_json(folder, file) for label, file in words.accuracy.items()}
    reports = [content for content in accuracy.values() if "results" in content]  # the study of a count head has none
    points = [point for report in reports for point in certified_points(report, folder.resolve().name)]
    return Card(folder, words, config, _read_json(folder, TRAINING), accuracy, points)


def render_card(folder: Path) -> dict[Path, str]:
    """
    The content of a card's files.

    Args:
        folder: of the model.

    Returns:
        Text by path from the folder: `README.md`, the pages of results, and `.eval_results/certified-accuracy.yaml` where
        there are certificates.

    Raises:
        ValueError: as [`read_words`]; for a results file that is missing, damaged or of another kind.
    """
    card = read_card(folder)
    words, training = card.words, card.training
    own = card.config["model_type"] == MixedNoiseViTConfig.model_type
    tags = ["randomized-smoothing", "certified-robustness", *(["mixed-noise-vit"] if own else [])]
    published = [
        point for point in card.points if _is_on_the_hub(point["entry"]["made_by"]["settings"]["dataset_name"])
    ]  # a private dataset means nothing to others
    try:
        if card.is_count_head:
            heading = "Accuracy from one pass"
            accuracy = "\n".join(render_results("count_head_accuracy", study) for study in card.accuracy.values())
        else:
            heading = next((name_of_figure(report["guarantee"]) for report in card.accuracy.values()), "")
            accuracy = render_accuracy(card.accuracy) if card.accuracy else ""
        text = render(
            "model_card",
            [TEMPLATES],
            metadata=card_metadata(card.name, published, tags, words.datasets, words.base_model),
            card=card,
            words=words,
            own=own,
            classifier=words.base_model or Path(training["settings"].get("base") or "my-model").name,
            size=card.config.get("image_size"),
            heading=heading,
            accuracy=accuracy,
            training=render_results("training_summary", training),
        )
        texts = {Path("README.md"): text}
        all_stages = Page("Training", "results/training.md", "training", TRAINING, text=words.training)
        for page in [all_stages, *words.pages]:
            texts[Path(page.file)] = _render_page(folder, card.name, page)
    except (KeyError, UndefinedError) as error:
        raise ValueError(f"{folder}: a results file lacks what its template shows: {error}.") from error
    if published:
        texts[EVAL_RESULTS] = eval_results(published)
    return texts


def _render_page(folder: Path, name: str, page: Page) -> str:
    figures = render_results(page.template, _read_json(folder, page.results))
    if page.template == "report":
        return figures
    above = os.path.dirname(page.file)  # noqa: PTH120  # links are URLs relative to the page

    def link(file: str) -> str:
        return Path(os.path.relpath(file, above)).as_posix()

    return render(
        "results_page",
        [TEMPLATES],
        page=page,
        figures=figures,
        pictures={caption: link(file) for caption, file in page.pictures.items()},
        results_file=link(page.results),
        card=link("README.md"),
        name=name,
    )


def write_card(folder: Path) -> list[Path]:
    """Write a card's files as [`render_card`] gives them, and remove metadata without certificates; return what changed."""
    changed = []
    texts = render_card(folder)
    if EVAL_RESULTS not in texts and (folder / EVAL_RESULTS).is_file():
        (folder / EVAL_RESULTS).unlink()
        changed.append(folder / EVAL_RESULTS)
    for name, text in texts.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def check_card(folder: Path) -> list[str]:
    """Where a card's files differ from what card.yaml and the results files give, one line per difference."""
    texts = render_card(folder)
    problems = []
    if EVAL_RESULTS not in texts and (folder / EVAL_RESULTS).is_file():
        problems.append(f"{folder / EVAL_RESULTS}: there are no certificates behind it.")
    for name, text in texts.items():
        path = folder / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        matcher = difflib.SequenceMatcher(None, lines, text.splitlines(), autojunk=False)
        for kind, first, _, _, _ in matcher.get_opcodes():
            if kind == "insert":
                problems.append(f"{path}, line {first + 1}: something is missing that the results files have.")
            elif kind != "equal":
                line = lines[first].strip()
                shown = line if len(line) < 200 else line[:200] + " ..."
                problems.append(f"{path}, line {first + 1}: not what card.yaml and the results files give: {shown}")
    return problems


def create_card(
    folder: Path,
    *,
    summary: str,
    dataset: str,
    base_model: str | None = None,
    sources: Sequence[str] = (),
    finetune_first: bool = False,
) -> None:
    """
    Write the first card of a trained model. A `card.yaml` that exists keeps its words.

    Args:
        folder: of the model, with `results/training.json`.
        summary: what it is, in a sentence.
        dataset: what it was trained on. The metadata name it if it is on the Hub.
        base_model: what it was trained from, likewise.
        sources: papers of this kind of model, besides those of all models here.
        finetune_first: whether it is a foundation to finetune.
    """
    if not (folder / WORDS).is_file():
        words: dict[str, Any] = {
            "summary": summary,
            "datasets": [dataset] if _is_on_the_hub(dataset) else [],
            "sources": [
                *sources,
                "[Exploring Transferability for Randomized Smoothing](https://arxiv.org/abs/2312.09020)",
                "[Certified Adversarial Robustness via Randomized Smoothing](https://arxiv.org/abs/1902.02918)",
            ],
        }
        if finetune_first:
            words["finetune_first"] = True
        if base_model is not None and _is_on_the_hub(base_model):
            words["base_model"] = base_model
        (folder / WORDS).write_text(yaml.safe_dump(words, sort_keys=False, width=140))
    write_card(folder)


def _is_on_the_hub(name: str) -> bool:
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return is_name and Path(name).suffix != ".parquet" and not Path(name).exists()


def _read_json(folder: Path, name: str) -> Json:
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read, but the card needs it: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no results.")
    return content
