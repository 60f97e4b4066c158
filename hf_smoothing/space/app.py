"""The page as a Space. The variable `HF_SMOOTHING_MODELS` of the Space names the models, separated by commas."""

import os


def main() -> None:
    """Start the page. Raises a `ValueError` where no model is named."""
    models = tuple(name.strip() for name in os.environ.get("HF_SMOOTHING_MODELS", "").split(",") if name.strip())
    if not models:
        raise ValueError(
            "No model is named: set the variable HF_SMOOTHING_MODELS of the Space (Settings, Variables) to image "
            "classifiers on the Hub, such as user/mixed-noise-vit-nano-cifar10."
        )
    import hf_smoothing
    from hf_smoothing.space.page import PageSettings, build_page, launch_page

    hf_smoothing.register()
    launch_page(build_page(PageSettings(models)))


if __name__ == "__main__":
    main()
