"""What commands and scripts show while they load."""


def hide_loading_bars() -> None:
    """Hide the bar "Loading weights" of transformers, which takes a second or less. Bars of downloads stay."""
    from huggingface_hub.utils import enable_progress_bars  # heavy: not for help
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of downloads too
    enable_progress_bars()
