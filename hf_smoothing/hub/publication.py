"""What a folder becomes on the Hub: which of its files, and what it takes to load them there."""

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import DatasetCard
from transformers.dynamic_module_utils import custom_object_save

from ..core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from ..core.modeling_count_prediction import MixedNoiseViTForCountPrediction
from ..core.modeling_mixed_noise_vit import MixedNoiseViTForImageClassification, MixedNoiseViTModel
from ..core.pipeline_certified_image_classification import CertifiedImageClassificationPipeline
from ..runs.run_folder import RunFolder

Json = dict[str, Any]

_MODEL_FILES = (
    "README.md", "card.yaml", "LICENSE*", "config.json", "preprocessor_config.json", "model*.safetensors",
    "model.safetensors.index.json", "calibration.json", "*.png", "*.svg", "results/*", ".eval_results/*.yaml",
)  # fmt: skip
_RUN_FILES = (
    "README.md", "LICENSE*", "certificates.parquet", "run.json", "report.md", "report.json", "*.png", "*.svg", "report/*",
)  # fmt: skip
_NEVER = ("*.jsonl", "*.lock", "*.part")
"""What runs and trainings keep for themselves while they go on, wherever it lies."""

_CLASSES: dict[str, tuple[type, str]] = {
    one.__name__: (one, auto)
    for one, auto in (
        (MixedNoiseViTForImageClassification, "AutoModelForImageClassification"),
        (MixedNoiseViTForCountPrediction, "AutoModel"),
        (MixedNoiseViTModel, "AutoModel"),
    )
}
"""By the name of a model's class: the class, and the Auto class that loads it as remote code."""

_TASK = "certified-image-classification"


@dataclass(frozen=True)
class Publication:
    """
    A folder as a repository.

    Attributes:
        folder: a model, a count head, or a finished run.
        kind: of the repository: a run is a dataset.
        files: path in the repository and file, of what is taken as it is.
        left_out: names in the folder of which nothing is taken.
        facts: what `config.json` or `run.json` says.
    """

    folder: Path
    kind: Literal["model", "dataset"]
    files: dict[str, Path]
    left_out: list[str]
    facts: Json

    def stage(self, target: Path) -> None:
        """
        Lay out the repository: links to the folder's files, and what is added to them. A model gets the code that loads it
        where this package is not installed; a run gets a card by which `load_dataset` finds its table.

        Args:
            target: an empty folder.
        """
        for path, file in self.files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).symlink_to(file.absolute())
        written = _add_code(self.facts, target) if self.kind == "model" else _card_of_run(self)
        for name, content in written.items():
            (target / name).unlink(missing_ok=True)  # the link: what it points to is to stay as it is
            (target / name).write_text(content, encoding="utf-8")


def publication_of(folder: str | Path) -> Publication:
    """
    What a folder becomes.

    Raises:
        ValueError: where it is neither a model of ours nor a finished run; the message says what is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    if (folder / "config.json").is_file():
        config = _read(folder / "config.json")
        _check_model(folder, config)
        return _publication(folder, "model", _MODEL_FILES, config)
    if not (folder / "run.json").is_file():
        raise ValueError(
            f"{str(folder)!r} has neither config.json nor run.json: push a model, a count head, or the folder of a run."
        )
    run_folder = RunFolder(folder)
    run_folder.read_settings()
    run_folder.check_table()
    return _publication(folder, "dataset", _RUN_FILES, run_folder.read_run())


def _publication(
    folder: Path, kind: Literal["model", "dataset"], patterns: tuple[str, ...], facts: Json
) -> Publication:
    tops = {pattern.split("/")[0] for pattern in patterns if "/" in pattern}
    found = [file for file in folder.iterdir() if file.is_file()]
    found += [file for top in tops for file in (folder / top).rglob("*") if file.is_file()]
    files = {}
    for file in sorted(found):
        path = file.relative_to(folder).as_posix()
        depth = "/" in path
        taken = any(fnmatch(path, pattern) for pattern in patterns if ("/" in pattern) == depth)
        if taken and not any(fnmatch(path, pattern) for pattern in _NEVER):
            files[path] = file
    taken_tops = {path.split("/")[0] for path in files}
    left_out = sorted(one.name + "/" * one.is_dir() for one in folder.iterdir() if one.name not in taken_tops)
    return Publication(folder, kind, files, left_out, facts)


def _read(path: Path) -> Json:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return found


def _check_model(folder: Path, config: Json) -> None:
    name = (config.get("architectures") or [None])[0]
    if config.get("model_type") != MixedNoiseViTConfig.model_type or name not in _CLASSES:
        raise ValueError(
            f"{folder} holds a {config.get('model_type')} model ({name}); of models only {', '.join(_CLASSES)} are "
            "published here. Any other: `hf upload`."
        )
    index = folder / "model.safetensors.index.json"
    needed = {"model.safetensors"}
    if index.is_file():
        needed = set(_read(index).get("weight_map", {}).values())
    if missing := sorted(one for one in {*needed, "preprocessor_config.json"} if not (folder / one).is_file()):
        raise ValueError(f"{folder} lacks {', '.join(missing)}: save model and image processor to it first.")


def _add_code(config: Json, target: Path) -> dict[str, str]:
    """Copy the code beside a model, and return its config with the names of the classes in there."""
    model, auto = _CLASSES[config["architectures"][0]]
    classes = {"AutoConfig": MixedNoiseViTConfig, auto: model}
    config = {**config, "auto_map": {name: _reference(one) for name, one in classes.items()}}
    config.pop("custom_pipelines", None)
    for one in classes.values():
        custom_object_save(one, target)  # the file, and those that it imports
    if model is MixedNoiseViTForImageClassification:
        custom_object_save(CertifiedImageClassificationPipeline, target)
        task = {"impl": _reference(CertifiedImageClassificationPipeline), "pt": [auto], "type": "image"}
        config["custom_pipelines"] = {_TASK: task}
    return {"config.json": json.dumps(config, indent=2, sort_keys=True) + "\n"}


def _reference(one: type) -> str:
    return f"{one.__module__.rpartition('.')[2]}.{one.__name__}"


def _card_of_run(publication: Publication) -> dict[str, str]:
    """The run's card; it names the table, since among several kinds of files nobody else says which are the data."""
    readme = publication.files.get("README.md")
    text = _text_on_run(publication.facts) if readme is None else readme.read_text(encoding="utf-8")
    card = DatasetCard(text)
    if "configs" not in card.data:
        files = [{"split": "certificates", "path": "certificates.parquet"}]
        card.data["configs"] = [{"config_name": "default", "data_files": files}]
    return {"README.md": str(card)}


def _text_on_run(run: Json) -> str:
    settings = run.get("settings", {})
    what = ("model_name_or_path", "dataset_name", "split", "sigmas", "method", "alpha", "radii", "seed", "dtype")
    known = "\n".join(f"| {name} | {settings[name]} |" for name in what if settings.get(name) is not None)
    return f"""---
tags: [randomized-smoothing, certified-robustness]
---
# Certificates

One row an image and noise level, from randomized smoothing with `hf_smoothing`: label, prediction (-1 where it abstains),
the radius in `[0, 1]` pixels within which no change changes the prediction, the `guarantee` that it carries, the counts that
it rests on. A row with an `error` is an image that could not be certified, and counts as wrong. `run.json` has the command,
versions and all settings.

| setting | value |
|---|---|
{known}
"""
