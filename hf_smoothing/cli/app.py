"""The command `hf-smoothing`."""

import typer

from . import certify_commands, hub_commands, model_commands, page_commands, report_commands

app = typer.Typer(
    no_args_is_help=True,
    # --image_column as well as --image-column: errors name flags as the scripts spell them
    context_settings={"token_normalize_func": lambda flag: flag.replace("_", "-")},
    rich_markup_mode=None,  # its tables cut names of options on narrow terminals
    pretty_exceptions_enable=False,
    help="Certified robustness for image classifiers, by randomized smoothing.",
)
for group in (certify_commands, report_commands, model_commands, hub_commands, page_commands):
    app.add_typer(group.app)
