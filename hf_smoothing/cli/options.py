"""Options of commands, made from the dataclasses that declare them."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..runs.settings import ExecutionSettings, NoiseLevel, RunSettings

_FIELDS = {field.name: field for kind in (RunSettings, ExecutionSettings) for field in fields(kind)}


def with_run_options(function: Callable[[RunSettings, ExecutionSettings], None]) -> Callable[..., None]:
    """Give a command all fields of `RunSettings` and `ExecutionSettings` as options; it is called with one of each."""

    @functools.wraps(function)
    def call(**options: Any) -> None:
        execution = {field.name: options.pop(field.name) for field in fields(ExecutionSettings)}
        function(RunSettings(**options), ExecutionSettings(**execution))

    hints = get_type_hints(RunSettings) | get_type_hints(ExecutionSettings)
    annotations = {name: Annotated[hints[name], option(name)] for name in _FIELDS}
    parameters = inspect.signature(RunSettings).parameters | inspect.signature(ExecutionSettings).parameters
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            parameters[name].replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotations[name])
            for name in _FIELDS
        ]
    )
    call.__annotations__ = annotations
    return call


def option(name: str) -> Any:
    """The option of a field of `RunSettings` or `ExecutionSettings`, for a parameter of a command."""
    metadata = _FIELDS[name].metadata
    parser = NoiseLevel if name == "sigmas" else None
    return typer.Option(
        *metadata.get("aliases", ()),
        parser=parser,
        callback=_SOURCES.get(name),
        help=f"{metadata['help'][0].upper()}{metadata['help'][1:]}.",
    )


def check_source(name: str | None) -> str | None:
    """Refuse the path of a model or dataset that is not there, before torch and transformers are imported."""
    if name is None or "://" in name or Path(name).exists():
        return name
    if name.startswith((".", "/", "~")) or name.endswith(".parquet") or name.count("/") > 1:
        raise typer.BadParameter(f"There is no {name!r} here, and a name on the Hub is like `user/name`.")
    return name


def is_name_of_callable(name: str) -> bool:
    """Whether it reads `module:function`."""
    return re.fullmatch(r"[\w.]+:[\w.]+", name) is not None and not Path(name).exists()


def _check_model(name: str | None) -> str | None:
    if name is not None and is_name_of_callable(name):
        raise typer.BadParameter(
            f"{name!r} names a Python callable, which `check` takes. To certify it, call "
            "`SmoothedClassifier(function, GaussianNoise(sigma)).certify(images)` in Python."
        )
    return check_source(name)


_SOURCES = {"model_name_or_path": _check_model, "dataset_name": check_source, "count_head": check_source}
"""Checks of the fields that take a name on the Hub or a path."""


def check_pictures(names: list[str]) -> list[str]:
    """Refuse pictures that are not there, before torch and transformers are imported."""
    for name in names:
        if not name.startswith(("http://", "https://")) and not Path(name).exists():
            raise typer.BadParameter(f"There is no image at {name!r}.")
    return names


Model = Annotated[str, option("model_name_or_path")]
Sigma = Annotated[float, typer.Option(help="Standard deviation of the noise, for pixels in [0, 1].")]
Alpha = Annotated[float, option("alpha")]
MaxDraws = Annotated[int | None, option("max_draws")]
Method = Annotated[str, option("method")]
CountHead = Annotated[str | None, option("count_head")]
Delta = Annotated[float | None, option("delta")]
NoiseResolution = Annotated[str, option("noise_resolution")]
Denoiser = Annotated[str | None, option("denoiser")]
Seed = Annotated[int | None, option("seed")]
Device = Annotated[str | None, option("device")]
BatchSize = Annotated[int, option("batch_size")]
