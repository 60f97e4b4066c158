"""Errors and checks of model loading, and a digest of weights."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Turn errors of loading into a `ValueError` that names the model, which transformers does not always do."""
    try:
        yield
    except OSError as error:
        where = "" if Path(model).exists() else "There is no such folder, and on the Hub: "
        raise ValueError(f"The model {model!r} cannot be loaded. {where}{error}") from error
    except SafetensorError as error:
        raise ValueError(f"The model {model!r} cannot be loaded: its weights are damaged ({error}).") from error


def read_config(model: str | Path, **hub_kwargs: Any) -> Any:
    """
    The config of a model. timm's `save_for_hf` writes the number of classes into `model_args` too, and transformers fails
    because it gets it twice. It is dropped there.
    """
    config = AutoConfig.from_pretrained(model, **hub_kwargs)
    if isinstance(arguments := getattr(config, "model_args", None), dict):
        config.model_args = {name: value for name, value in arguments.items() if name != "num_classes"}
    return config


def check_loaded_weights(model: str, info: Mapping[str, Any], reinitialized: tuple[str, ...]) -> None:
    """
    Raise a `ValueError` if a checkpoint lacks weights that its config asks for: transformers would reinitialize them.

    Args:
        model: its name.
        info: the loading info of `from_pretrained(..., output_loading_info=True)`.
        reinitialized: prefixes of weights that may be missing, superfluous, or of another shape, such as the head's.
    """
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    keys = [key if isinstance(key, str) else key[0] for kind in kinds for key in info.get(kind, ())]
    if misfits := sorted({key for key in keys if not key.startswith(reinitialized)}):
        more = "" if len(misfits) < 4 else f" and {len(misfits) - 3} more"
        raise ValueError(
            f"The weights of {model!r} are not those of its config.json: {', '.join(misfits[:3])}{more} are missing, too "
            "many, or of another shape."
        )


def check_is_classifier(model: Any) -> None:
    """Raise a `ValueError` for a count head: it loads as a classifier, but its class scores are no answers."""
    config = getattr(model, "config", None)
    if "MixedNoiseViTForCountPrediction" in (getattr(config, "architectures", None) or ()):
        name = getattr(config, "_name_or_path", "")
        raise ValueError(
            f"The model {name!r} is a count head, which predicts how often noisy copies get each class, and no classifier: "
            "pass it as count_head, beside the classifier that it was trained for."
        )


def check_weights(module: nn.Module) -> None:
    """Raise a `ValueError` that names the first weights that are not finite."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"The weights of {name!r} are not all finite: the checkpoint is broken or not loaded.")


def weights_digest(model: Any) -> str:
    """A hash of a module's names, shapes, types and weights."""
    return _digest(model.state_dict())


def saved_weights_digest(folder: Path) -> str | None:
    """The [`weights_digest`] of the model saved in a folder, loaded in float32; `None` without its `model.safetensors`."""
    try:
        weights = load_file(folder / "model.safetensors")
    except (FileNotFoundError, SafetensorError):  # or a pointer of Git LFS
        return None
    return _digest(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    )


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
