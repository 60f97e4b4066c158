"""Markdown from results files: each kind of results has a template, and some need figures derived from those in the file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..reporting.rendering import format_count, render
from ..reporting.report import Json, best_by_radius, render_report, wrong_certificates
from ..reporting.results import name_of_figure
from ..utils.files import read_json
from .count_head_results import count_head_data, count_head_summary

TEMPLATES = Path(__file__).parent / "templates"

_BOOKKEEPING = {"output_dir", "resume_from_checkpoint", "checkpointing_steps", "logging_steps", "report_to", "base"}
"""Settings of a training that change nothing in the model."""

_SETTINGS_OF_CARD = {"dataset_name", "sigmas", "sigma_weights", "consistency_weight", "base_share"}
"""What a card shows of the settings of each stage: the images, the noise, what is learned from it and kept."""


def render_results(template: str, results: Json) -> str:
    """
    Results as Markdown.

    Args:
        template: the kind of results, a template of `hub/templates`, or `report` for a `report.json`.
        results: the content of the results file.

    Raises:
        ValueError: for an unknown template.
        jinja2.UndefinedError: for results that lack something that the template shows.
    """
    if template == "report":
        return render_report(results)
    if not (TEMPLATES / f"{template}.md.jinja").is_file():
        known = ", ".join(sorted(path.name.removesuffix(".md.jinja") for path in TEMPLATES.glob("*.jinja")))
        raise ValueError(f"template={template!r} is unknown: use report, {known}.")
    derive = _DERIVE.get(template)
    return render(template, [TEMPLATES], results=results, **(derive(results) if derive else {}))


def render_results_file(template: str, path: Path, *further: Path) -> str:
    """
    A results file as Markdown, together with the files beside it that its template shows too where they exist.

    Args:
        template: as [`render_results`].
        path: of the results file.
        *further: more results files for the template, which calls each by the name of its folder.

    Raises:
        ValueError: as [`render_results`]; for a file that is missing or damaged.
        jinja2.UndefinedError: as [`render_results`].
    """
    beside = {name: path.with_name(f"{name}.json") for name in _BESIDE.get(template, ())}
    more = {name: read_json(file) for name, file in beside.items() if file.is_file()}
    more |= {file.parent.name.replace("-", "_"): read_json(file) for file in further}
    return render_results(template, {**read_json(path), **more})


def render_accuracy(reports: dict[str, Json]) -> str:
    """
    The table of a card: certified accuracy at each radius, from the content of `report.json` files by label.

    Raises:
        ValueError: for reports of different guarantees or alphas, which do not belong in one table, and for one on different
            images, whose best shares mean nothing.
    """
    for label, report in reports.items():
        if len(sets := report.get("image_sets", [])) > 1:
            each = "; ".join(f"{', '.join(images['titles'])}: {images['num_images']}" for images in sets)
            raise ValueError(f"The runs of {label!r} have different images: report those of each alone. {each}.")
    tables = [{"label": label, **_accuracy_table(report)} for label, report in reports.items()]
    if len({(table["guarantee"], table["alpha"]) for table in tables}) > 1:
        kinds = "; ".join(f"{table['label']}: {table['guarantee']}, alpha = {table['alpha']}" for table in tables)
        raise ValueError(f"Reports of different guarantees or alphas do not make one table. {kinds}.")
    return render("certified_accuracy", [TEMPLATES], tables=tables)


def _accuracy_table(report: Json) -> Json:
    entry = report["results"][0]
    settings = entry["made_by"].get("settings", {})
    return {
        "figure": name_of_figure(report["guarantee"]),
        "rows": best_by_radius(report["results"]),
        "images": entry["num_images"],
        "alpha": entry["alpha"],
        "guarantee": report["guarantee"],
        "sampling": sorted({kind for result in report["results"] for kind in result.get("sampling", {})}),
        "wrong": wrong_certificates(report["results"]),
        "max_draws": settings.get("n") or settings.get("max_draws"),
        **{name: settings.get(name) for name in ("dataset_name", "split", "every", "dtype")},
    }


def training_data(results: Json) -> Json:
    """
    The stages of a training, first to last.

    Returns:
        `stages`: the results of each stage, with its `workers` and the `launcher` of its command; `rows`: a table of the
        settings in which the stages differ, and of the results; `evaluated`: the stages with accuracies by their name;
        `held_out`: the share of the images that a count head was evaluated on, or None.
    """
    stages = [results]
    while "continues" in stages[0]:
        stages.insert(0, stages[0]["continues"])
    names = [f"{number}. {Path(stage['command'].split()[0]).stem}" for number, stage in enumerate(stages, 1)]
    table = {
        name: [_format_setting(_effective_settings(stage).get(name)) for stage in stages]
        for name in _differing(stages)
    }
    table |= {
        "steps": [f"{stage['steps']:,}" for stage in stages],
        "images seen": [f"{stage['images_seen']:,}" for stage in stages],
        "minutes": [_format_minutes(stage["seconds"] / 60) for stage in stages],
        "final training loss": [f"{stage['final_loss']:.3f}" for stage in stages],
    }
    evaluations = [stage.get("evaluation") or {} for stage in stages]
    for key in dict.fromkeys(key for evaluation in evaluations for key in evaluation):
        if key in _MEASURES or key.startswith(ACCURACY):
            label, spec = _MEASURES.get(key, (f"accuracy at sigma {key.removeprefix(ACCURACY)}", ".1%"))
            table[label] = [format(found[key], spec) if key in found else "-" for found in evaluations]
    return {
        "stages": [{**stage, "launcher": _launcher(stage), "workers": _workers(stage)} for stage in stages],
        "rows": [{" ": label, **dict(zip(names, cells))} for label, cells in table.items()],
        "evaluated": {
            name: stage for name, stage in zip(names, stages) if (stage.get("evaluation") or {}).keys() - _MEASURES
        },
        "held_out": results["settings"]["eval_share"] if evaluations[-1].keys() & _MEASURES else None,
    }


ACCURACY = "majority_accuracy_sigma_"
"""What the accuracy at a noise level is named in the results of a training, before the level."""

_MEASURES = {
    "jensen_shannon": ("Jensen-Shannon divergence, nats", ".4f"),
    "top1_disagreement": ("another most frequent class", ".1%"),
    "top_frequency_error": ("error of the top frequency", "+.4f"),
}
"""What a count head is evaluated by on images that were held out."""


def training_summary_data(results: Json) -> Json:
    """
    As [`training_data`], for the card: of the settings only images and noise, and accuracies of earlier stages, which have
    other classes, only where the last stage has some.
    """
    data = training_data(results)
    hidden = set(_differing(data["stages"])) - _SETTINGS_OF_CARD
    data["rows"] = [row for row in data["rows"] if row[" "] not in hidden]
    if not results.get("evaluation"):
        data["evaluated"] = {}
        data["rows"] = [row for row in data["rows"] if not row[" "].startswith("accuracy at sigma")]
    return data


def _differing(stages: Sequence[Json]) -> list[str]:
    settings = [_effective_settings(stage) for stage in stages]
    names = dict.fromkeys(name for values in settings for name in values if name not in _BOOKKEEPING)
    return [name for name in names if any(values.get(name) != settings[0].get(name) for values in settings)]


def _effective_settings(stage: Json) -> Json:
    """The settings of a training, without the number of epochs where a number of steps took its place."""
    settings = stage["settings"]
    return {**settings, "num_train_epochs": None} if settings.get("max_train_steps") else settings


def _format_setting(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    if isinstance(value, str) and value.startswith(("/", ".", "~")):
        return Path(value).name  # folders of a machine mean nothing to others
    return f"{value:g}" if isinstance(value, float) else str(value)


def _format_minutes(minutes: float) -> str:
    return f"{minutes:.0f}" if minutes >= 1 else f"{minutes:.1f}"


def _launcher(training: Json) -> str:
    processes = training.get("num_processes", 1)
    # `accelerate launch --cpu` starts one process only
    on_cpus = processes > 1 and training["device"].startswith("cpu")
    return f"torchrun --nproc_per_node {processes}" if on_cpus else "accelerate launch"


def _workers(training: Json) -> str:
    processes, threads = training.get("num_processes", 1), format_count(training["num_threads"], "thread")
    return threads if processes == 1 else f"{processes} processes of {threads}"


_BESIDE = {
    "benchmark": ("engine", "single-pictures", "kills"),
    "cohen_counts": ("budgets",),
}
"""By template: names of results files beside its own, which it shows under their name where they exist."""

_DERIVE: dict[str, Callable[[Json], Json]] = {
    "training": training_data,
    "training_summary": training_summary_data,
    "count_head": count_head_data,
    "count_head_accuracy": count_head_summary,
}
"""By template: what it shows besides the results as they are."""
