"""Loading models by name, and a look at what was loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Name the model that could not be loaded, since transformers does not always: a `ValueError` for an `OSError`."""
    try:
        yield
    except OSError as error:
        where = "" if Path(model).exists() else "There is no such folder, and on the Hub: "
        raise ValueError(f"The model {model!r} cannot be loaded. {where}{error}") from error


def check_weights(module: nn.Module) -> None:
    """Raise a `ValueError` that names the first weights that are not finite."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"The weights of {name!r} are not all finite: the checkpoint is broken or was not loaded."
            )
