"""A folder as a repository on the Hub: which of its files belong to it, and what is added to load them there."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import DatasetCard, ModelCard
from transformers.dynamic_module_utils import custom_object_save

from ..core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from ..core.modeling_count_prediction import MixedNoiseViTForCountPrediction
from ..core.modeling_mixed_noise_vit import MixedNoiseViTForImageClassification, MixedNoiseViTModel
from ..core.pipeline_certified_image_classification import CertifiedImageClassificationPipeline
from ..reporting.rendering import render
from ..runs.run_folder import RunFolder
from ..utils.files import read_json
from .results_pages import TEMPLATES

Json = dict[str, Any]

_MODEL_FILES = (
    "README.md", "card.yaml", "LICENSE*", "config.json", "preprocessor_config.json", "model*.safetensors",
    "model.safetensors.index.json", "calibration.json", "*.png", "*.svg", "results/",
)  # fmt: skip
_RUN_FILES = (
    "README.md", "LICENSE*", "certificates.parquet", "run.json", "report.md", "report.json", "*.png", "*.svg", "report/",
)  # fmt: skip
_NEVER = ("*.jsonl", "*.lock", "*.part")
"""Working files of runs and trainings, in whatever folder."""

_CLASSES: dict[str, tuple[type, str]] = {
    "MixedNoiseViTForImageClassification": (MixedNoiseViTForImageClassification, "AutoModelForImageClassification"),
    "MixedNoiseViTForCountPrediction": (MixedNoiseViTForCountPrediction, "AutoModel"),
    "MixedNoiseViTModel": (MixedNoiseViTModel, "AutoModel"),
}
"""By the name of a model's class: the class, and the Auto class that loads it as remote code."""

_TASK = "certified-image-classification"


@dataclass(frozen=True)
class Publication:
    """
    A folder as a repository.

    Attributes:
        folder: a model, a count head, or a finished run.
        kind: of the repository; a run becomes a dataset.
        files: by path in the repository, the files that are published unchanged.
        left_out: names in the folder that are not published.
        facts: the content of `config.json` or `run.json`.
    """

    folder: Path
    kind: Literal["model", "dataset"]
    files: dict[str, Path]
    left_out: list[str]
    facts: Json

    @property
    def is_unfinished(self) -> bool:
        """Whether it is a model whose training was cut short: trained here, without the results that its end writes."""
        began = (self.folder / "training_log.jsonl").is_file() or any(self.folder.glob("step_*/settings.json"))
        return self.kind == "model" and began and not (self.folder / "results" / "training.json").is_file()

    def stage(self, target: Path, repo_id: str) -> None:
        """
        Lay out the repository: links to the files of the folder, and what is added to them. A model gets the code that loads
        it where this package is not installed. A run gets a card that names its table for `load_dataset`.

        Args:
            target: an empty folder.
            repo_id: the repository. The examples in the card of a model name it, in place of the folder.
        """
        for path, file in self.files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).symlink_to(file.absolute())
        if self.kind == "model":
            written = {**_add_code(self.facts, target), **_card_of_model(self, repo_id)}
        else:
            written = _card_of_run(self)
        for name, content in written.items():
            (target / name).unlink(missing_ok=True)  # a link: the file behind it stays unchanged
            (target / name).write_text(content, encoding="utf-8")


def publication_of(folder: str | Path) -> Publication:
    """
    The publication of a folder.

    Raises:
        ValueError: for a folder that is neither a model of this package nor a finished run, or lacks files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        _check_model(folder, config)
        return _publication(folder, "model", _MODEL_FILES, config)
    if not (folder / "run.json").is_file():
        raise ValueError(
            f"{str(folder)!r} has neither config.json nor run.json: push a model, a count head, or the folder of a run."
        )
    run_folder = RunFolder(folder)
    run_folder.read_settings()
    run_folder.read_records(["index"])  # raises where the table is not Parquet
    return _publication(folder, "dataset", _RUN_FILES, run_folder.read_run())


def _publication(folder: Path, kind: Literal["model", "dataset"], patterns: Sequence[str], facts: Json) -> Publication:
    entries = {path: path.name + "/" * path.is_dir() for path in sorted(folder.iterdir())}
    files: dict[str, Path] = {}
    for path, name in entries.items():
        if any(fnmatch(name, pattern) for pattern in patterns):
            inside = path.rglob("*") if path.is_dir() else [path]
            files |= {file.relative_to(folder).as_posix(): file for file in inside if file.is_file()}
    files = {name: files[name] for name in sorted(files) if not any(fnmatch(name, never) for never in _NEVER)}
    published = {name.split("/")[0] for name in files}
    return Publication(
        folder, kind, files, [name for path, name in entries.items() if path.name not in published], facts
    )


def _check_model(folder: Path, config: Json) -> None:
    name = (config.get("architectures") or [None])[0]
    if config.get("model_type") != MixedNoiseViTConfig.model_type or name not in _CLASSES:
        raise ValueError(
            f"{folder} holds a {config.get('model_type')} model ({name}); only {', '.join(_CLASSES)} are "
            "published here. Use `hf upload` for any other model."
        )
    index = folder / "model.safetensors.index.json"
    weights = read_json(index).get("weight_map", {}).values() if index.is_file() else ["model.safetensors"]
    if missing := sorted(file for file in {*weights, "preprocessor_config.json"} if not (folder / file).is_file()):
        raise ValueError(f"{folder} lacks {', '.join(missing)}: save model and image processor to it first.")


def _add_code(config: Json, target: Path) -> dict[str, str]:
    """Copy the code beside a model, and return its config with the names of the classes in there."""
    model, auto = _CLASSES[config["architectures"][0]]
    classes = {"AutoConfig": MixedNoiseViTConfig, auto: model}
    config = {**config, "auto_map": {name: _reference(class_of_code) for name, class_of_code in classes.items()}}
    config.pop("custom_pipelines", None)
    for class_of_code in classes.values():
        custom_object_save(class_of_code, target)  # the file, and those that it imports
    if model is MixedNoiseViTForImageClassification:
        custom_object_save(CertifiedImageClassificationPipeline, target)
        task = {"impl": _reference(CertifiedImageClassificationPipeline), "pt": [auto], "type": "image"}
        config["custom_pipelines"] = {_TASK: task}
    return {"config.json": json.dumps(config, indent=2, sort_keys=True) + "\n"}


def _reference(class_of_code: type) -> str:
    return f"{class_of_code.__module__.rpartition('.')[2]}.{class_of_code.__name__}"


def _card_of_model(publication: Publication, repo_id: str) -> dict[str, str]:
    """The card of a model, with the repository's name where it names the folder: metadata, title, examples."""
    if (readme := publication.files.get("README.md")) is None:
        return {}
    name = publication.folder.resolve().name
    text = re.sub(rf'"(?:[\w.-]+/)*{re.escape(name)}"', f'"{repo_id}"', readme.read_text(encoding="utf-8"))
    published = repo_id.split("/")[-1]
    card = ModelCard(re.sub(rf"^# {re.escape(name)}$", f"# {published}", text, flags=re.MULTILINE))
    if card.data.get("model_name") == name:
        card.data["model_name"] = published
    return {"README.md": str(card)}


def _card_of_run(publication: Publication) -> dict[str, str]:
    """The card of a run. It names the table: `load_dataset` cannot tell which of several kinds of files are the data."""
    readme = publication.files.get("README.md")
    settings = publication.facts.get("settings", {})
    text = readme.read_text(encoding="utf-8") if readme else render("run_card", [TEMPLATES], settings=settings)
    card = DatasetCard(text)
    if "configs" not in card.data:
        table = {"split": "certificates", "path": "certificates.parquet"}
        card.data["configs"] = [{"config_name": "default", "data_files": [table]}]
    return {"README.md": str(card)}
