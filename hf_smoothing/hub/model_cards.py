"""Model cards: templates, filled from `card.yaml` (words) and results files (figures)."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path, PurePosixPath

import yaml
from jinja2 import UndefinedError

from ..core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from ..core.weights import saved_weights_digest
from ..reporting.rendering import render
from ..reporting.results import name_of_figure
from ..utils.files import read_json
from .card_metadata import card_metadata, certified_points
from .results_pages import ACCURACY, TEMPLATES, Json, render_accuracy, render_results, render_results_file

WORDS = "card.yaml"
TRAINING = "results/training.json"

DEMO_CLASSES = set(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
"""Of the images that ship with the package, which show how to use a model of these classes."""


@dataclass(frozen=True)
class Picture:
    """A picture of a card, by its path from the folder of the model."""

    file: str
    caption: str


@dataclass(frozen=True)
class Page:
    """A page of results that the card links to. Paths start at the folder of the model."""

    title: str
    file: str
    """The page, a Markdown file."""
    template: str
    """How the results are shown, see [`render_results`]. A `report` has no other words than its own."""
    results: str
    summary: str = ""
    """What the card says of the page."""
    text: str = ""
    """Markdown before the figures."""
    pictures: dict[str, str] = field(default_factory=dict)
    """Files by caption."""


@dataclass(frozen=True)
class Words:
    """What `card.yaml` holds: the words of a card, and which results files its figures come from."""

    datasets: list[str]
    """Names on the Hub of what it was trained on."""
    sources: list[str]
    """In Markdown. The Hub lists the model on the page of each paper that is linked (`https://arxiv.org/abs/...`)."""
    summary: str = ""
    """What the model is, in two or three sentences of Markdown. Without it, the card says what its training tells."""
    location: str = ""
    """Where the examples find the model: the folder that holds its folder, or the name of a user on the Hub."""
    tagline: str = ""
    """The summary in a few words, for a table of models."""
    picture: Picture | None = None
    accuracy: dict[str, str] = field(default_factory=dict)
    """The table of the card: by label, a `report.json` or the study of a count head."""
    sigma: float = 0.25
    """Noise level of the example, in `[0, 1]` pixels."""
    finetune_first: bool = False
    """Whether the model is a foundation to finetune, not a classifier to use."""
    estimates_only: bool = False
    """Whether it is a count head for classifiers that this package cannot load: it can guide or calibrate nothing."""
    base_model: str | None = None
    """The name on the Hub of what it was trained from."""
    license: str | None = None
    """Its identifier on the Hub. The owner of the model chooses it."""
    training: str = ""
    """Words on the training, besides what `results/training.json` holds."""
    pages: list[Page] = field(default_factory=list)
    """All other results."""


def read_words(folder: Path) -> Words:
    """
    The words of the card of a model.

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
    pictures = [words.picture.file] if words.picture else []
    pictures += [file for page in pages for file in page.pictures.values()]
    if missing := [file for file in pictures if not (folder / file).is_file()]:
        raise ValueError(f"{path}: there is no picture {missing[0]!r}.")
    return words


@dataclass(frozen=True)
class Card:
    """
    The data of a card.

    Attributes:
        name: of the model.
        words: from `card.yaml`.
        config: the content of `config.json`.
        training: the content of `results/training.json`.
        accuracy: the content of the results files of the card's table, by label.
        points: the certified accuracy of this model at each radius, see [`certified_points`].
    """

    name: str
    words: Words
    config: Json
    training: Json
    accuracy: dict[str, Json]
    points: list[Json]

    @property
    def class_names(self) -> list[str]:
        return list(self.config.get("id2label", {}).values())

    @property
    def is_count_head(self) -> bool:
        """Whether the model predicts counts, and is no classifier."""
        return bool(self.config.get("count_sigmas"))


def read_card(folder: Path) -> Card:
    """
    The data of the card of a model.

    Raises:
        ValueError: as [`read_words`]; for a results file that is missing or damaged.
    """
    name, words = folder.resolve().name, read_words(folder)
    accuracy = {label: read_json(folder / file) for label, file in words.accuracy.items()}
    reports = [content for content in accuracy.values() if "results" in content]  # the study of a count head has none
    weights = saved_weights_digest(folder)
    points = [point for report in reports for point in certified_points(report, name, weights)]
    return Card(name, words, read_json(folder / "config.json"), read_json(folder / TRAINING), accuracy, points)


def render_card(folder: Path) -> dict[Path, str]:
    """
    The content of `README.md` and of the pages of results, by path.

    Raises:
        ValueError: as [`read_card`]; for a results file of another kind.
    """
    card = read_card(folder)
    words = card.words
    own = card.config["model_type"] == MixedNoiseViTConfig.model_type
    tags = ["randomized-smoothing", "certified-robustness", *(["mixed-noise-vit"] if own else [])]
    # a private dataset means nothing to others
    published = [
        point for point in card.points if _is_on_the_hub(point["entry"]["made_by"]["settings"]["dataset_name"])
    ]
    try:
        if card.is_count_head:
            kinds = [_kind_of_study(study) for study in card.accuracy.values()]
            heading = "Draws with the head" if "guided_runs_summary" in kinds else "Accuracy from one pass"
            accuracy = "\n".join(render_results(*shown) for shown in zip(kinds, card.accuracy.values()))
        else:
            heading = next((name_of_figure(report["guarantee"]) for report in card.accuracy.values()), "")
            accuracy = render_accuracy(card.accuracy) if card.accuracy else ""
        shown = {"card": card, "words": words, "own": own, "heading": heading, "accuracy": accuracy}
        classifier = Path(words.base_model or card.training["settings"].get("base") or "my-model").name
        text = render(
            "model_card",
            [TEMPLATES],
            **shown,
            metadata=card_metadata(card.name, published, tags, words.datasets, words.base_model, words.license),
            summary=words.summary or _describe_training(card),
            name=str(PurePosixPath(words.location, card.name)),
            classifier=words.base_model or str(PurePosixPath(words.location, classifier)),
            is_demo=set(card.class_names) <= DEMO_CLASSES,
            size=card.config.get("image_size"),
            training=render_results("training_summary", card.training),
        )
        all_stages = Page("Training", "results/training.md", "training", TRAINING, text=words.training)
        pages = {folder / page.file: _render_page(folder, card.name, page) for page in [all_stages, *words.pages]}
    except (KeyError, UndefinedError) as error:
        raise ValueError(f"{folder}: a results file lacks what its template shows: {error}.") from error
    return {folder / "README.md": text, **pages}


def _describe_training(card: Card) -> str:
    """What the model is, how it was trained and how often it is right, from the results of its training."""
    settings, evaluation = card.training["settings"], card.training.get("evaluation") or {}
    dataset, base = str(settings.get("dataset_name")), card.words.base_model or card.training.get("base")
    published = dataset in card.words.datasets
    return render(
        "model_summary",
        [TEMPLATES],
        training=card.training,
        classes=card.class_names,
        foundation=card.words.finetune_first,
        base=base,
        dataset=f"[{dataset}](https://huggingface.co/datasets/{dataset})" if published else f"`{Path(dataset).name}`",
        accuracies={
            key.removeprefix(ACCURACY): share for key, share in evaluation.items() if key.startswith(ACCURACY)
        },
        certified=bool(card.accuracy),
    )


def _kind_of_study(study: Json) -> str:
    """The template that shows a study of a count head in a card."""
    kinds = {"arms": "cohen_counts_accuracy", "pairs": "guided_runs_summary"}
    return next((template for key, template in kinds.items() if key in study), "count_head_accuracy")


def _render_page(folder: Path, name: str, page: Page) -> str:
    figures = render_results_file(page.template, folder / page.results)
    if page.template == "report":
        return figures
    above = os.path.dirname(page.file)  # noqa: PTH120  # links are URLs relative to the page

    def link(file: str) -> str:
        return Path(os.path.relpath(file, above)).as_posix()

    return render(
        "results_page",
        [TEMPLATES],
        page=page,
        name=name,
        figures=figures,
        pictures={caption: link(file) for caption, file in page.pictures.items()},
        results_file=link(page.results),
        card=link("README.md"),
    )


def write_card(folder: Path) -> list[Path]:
    """Write a card's files as [`render_card`] gives them; return those that changed."""
    changed = []
    for path, _, text in _differing_files(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        changed.append(path)
    return changed


def check_card(folder: Path) -> list[str]:
    """The first line of each file of a card that is not what card.yaml and the results files give."""
    problems = []
    for path, *texts in _differing_files(folder):
        lines = zip_longest(*(text.splitlines(keepends=True) for text in texts), fillvalue="")
        number, line = next((number, line) for number, (line, wanted) in enumerate(lines, 1) if line != wanted)
        problems.append(f"{path}, line {number}: not what card.yaml and the results files give: {line.strip():.200}")
    return problems


def _differing_files(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """The path of each file that differs from what [`render_card`] gives, its text, and the text that it should have."""
    for path, wanted in render_card(folder).items():
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text != wanted:
            yield path, text, wanted


def create_card(
    folder: Path,
    *,
    dataset: str,
    summary: str = "",
    base_model: str | None = None,
    sources: Sequence[str] = (),
    finetune_first: bool = False,
) -> None:
    """
    Write the first card of a trained model. A `card.yaml` that exists keeps its words.

    Args:
        folder: of the model, with `results/training.json`.
        dataset: what it was trained on; named if it is on the Hub.
        summary: what it is, in a sentence; by default what the results of its training tell.
        base_model: what it was trained from, likewise.
        sources: papers of this kind of model, besides those of all models here.
        finetune_first: whether it is a foundation to finetune.
    """
    if not (folder / WORDS).is_file():
        words = {
            **({"summary": summary} if summary else {}),
            "datasets": [dataset] if _is_on_the_hub(dataset) else [],
            "sources": [
                *sources,
                "[Exploring Transferability for Randomized Smoothing](https://arxiv.org/abs/2312.09020)",
                "[Certified Adversarial Robustness via Randomized Smoothing](https://arxiv.org/abs/1902.02918)",
            ],
            "finetune_first": finetune_first,
            "base_model": base_model if base_model and _is_on_the_hub(base_model) else None,
        }
        (folder / WORDS).write_text(yaml.safe_dump(words, sort_keys=False, width=140))
    write_card(folder)


def _is_on_the_hub(name: str) -> bool:
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return is_name and Path(name).suffix != ".parquet" and not Path(name).exists()
