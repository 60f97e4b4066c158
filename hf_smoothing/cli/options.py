"""Options of commands, made from the dataclasses that declare them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from ..runs.settings import ExecutionSettings, RunSettings


def with_options(*settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """
    Give a command the fields of dataclasses as options. The command is called with an instance of each dataclass.

    Args:
        settings: the dataclasses. The metadata of their fields holds `help`, and `aliases` where the scripts, which follow
            transformers, have a longer flag.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(**options: Any) -> None:
            names = [[field.name for field in dataclasses.fields(kind)] for kind in settings]  # type: ignore[arg-type]
            function(*(kind(**{name: options[name] for name in own}) for kind, own in zip(settings, names)))

        parameters = [_parameter(kind, field.name) for kind in settings for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del call.__wrapped__  # type: ignore[attr-defined]
        return call

    return decorate


def option(settings: type, name: str) -> Any:
    """
    The option of one field of a dataclass, for a parameter of a command.

    Args:
        settings: the dataclass.
        name: the field.
    """
    field = next(field for field in dataclasses.fields(settings) if field.name == name)  # type: ignore[arg-type]
    help_text = field.metadata["help"]
    return typer.Option(*field.metadata.get("aliases", ()), help=f"{help_text[0].upper()}{help_text[1:]}.")


def _parameter(settings: type, name: str) -> inspect.Parameter:
    field = next(field for field in dataclasses.fields(settings) if field.name == name)  # type: ignore[arg-type]
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    annotation = Annotated[get_type_hints(settings)[name], option(settings, name)]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


Model = Annotated[str, option(RunSettings, "model_name_or_path")]
Sigma = Annotated[float, typer.Option(help="Standard deviation of the noise, in [0, 1] pixels.")]
Alpha = Annotated[float, option(RunSettings, "alpha")]
MaxDraws = Annotated[int | None, option(RunSettings, "max_draws")]
Method = Annotated[str, option(RunSettings, "method")]
CountHead = Annotated[str | None, option(RunSettings, "count_head")]
Delta = Annotated[float | None, option(RunSettings, "delta")]
NoiseResolution = Annotated[str, option(RunSettings, "noise_resolution")]
Denoiser = Annotated[str | None, option(RunSettings, "denoiser")]
Seed = Annotated[int, option(RunSettings, "seed")]
BatchSize = Annotated[int, option(ExecutionSettings, "batch_size")]
