"""Adding the results of a finished run to the card of a model."""

import shutil
from pathlib import Path

import yaml

from ..reporting.report import write_report
from ..runs.run_folder import RunFolder
from .model_cards import WORDS, read_words, write_card


def add_run(folder: Path, run: Path) -> list[Path]:
    """
    Add a finished run to a card: copy it to `results` of the model, write its report there, and name that in `card.yaml`, as
    the card's table of certified accuracy and as a page.

    Args:
        folder: of the model, with `card.yaml`.
        run: folder of the run, in `results` of the model or anywhere else.

    Returns:
        The files of the card that changed.

    Raises:
        ValueError: for a run that is unfinished or of another model, a folder of its name that is something else, or a run
            that does not go into one table with those that are there. `card.yaml` then stays as it is.
    """
    read_words(folder)
    settings = RunFolder(run).read_settings()
    model, name = str(settings.get("model_name_or_path")), run.resolve().name
    if Path(model).name != folder.resolve().name:
        raise ValueError(f"{run} certified the model {model!r}, not {folder.resolve().name!r}.")
    target = folder / "results" / name
    if target.resolve() != run.resolve():
        if target.exists():
            raise ValueError(f"{target} exists: remove it, or rename {run}.")
        target.mkdir(parents=True)
        for file in ("certificates.parquet", "run.json"):
            shutil.copy(run / file, target / file)
    write_report([target], target / "report")
    dataset = Path(str(settings.get("dataset_name", name))).stem
    return _name_report(folder, f"results/{name}/report/report", dataset, f"Certified accuracy on {dataset} ({name})")


def _name_report(folder: Path, report: str, label: str, title: str) -> list[Path]:
    """Name a report in `card.yaml` and write the card; what fails leaves `card.yaml` unchanged."""
    path = folder / WORDS
    before = path.read_text(encoding="utf-8")
    words = yaml.safe_load(before)
    accuracy, pages = words.get("accuracy") or {}, words.get("pages") or []
    file = f"{report}.json"
    if file not in accuracy.values():
        accuracy[label if label not in accuracy else title] = file
    if all(page["results"] != file for page in pages):
        pages.append({"title": title, "file": f"{report}.md", "template": "report", "results": file})
    words |= {"accuracy": accuracy, "pages": pages}
    path.write_text(yaml.safe_dump(words, sort_keys=False, width=140, allow_unicode=True), encoding="utf-8")
    try:
        return write_card(folder)
    except ValueError:
        path.write_text(before, encoding="utf-8")
        raise
