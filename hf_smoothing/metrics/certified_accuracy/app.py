"""The page of the metric as a Space: a table of certificates in, certified accuracy out."""

from pathlib import Path
from typing import Any

import evaluate

COLUMNS = ("predictions", "references", "radii")


def compute(rows: list[list[Any]], thresholds: str) -> dict[str, Any]:
    """
    Certified accuracy of the rows of a table.

    Args:
        rows: prediction, reference and radius of each image, as numbers or text; empty rows are left out.
        thresholds: radii at which to count, separated by commas.

    Raises:
        ValueError: for what is no number, or no prediction, reference or radius.
    """
    filled = [row for row in rows if any(str(cell).strip() for cell in row)]
    columns = {name: [float(row[at]) for row in filled] for at, name in enumerate(COLUMNS)}
    levels = [float(level) for level in thresholds.split(",") if level.strip()]
    return evaluate.load(str(Path(__file__).parent)).compute(**columns, thresholds=levels)


if __name__ == "__main__":
    import gradio as gr  # type: ignore[import-not-found]  # a Space has it; nothing else here needs it

    gr.Interface(
        fn=compute,
        inputs=[
            gr.Dataframe([[6, 6, 0.31], [8, 8, 0.9], [-1, 3, 0.0]], headers=list(COLUMNS), type="array"),
            gr.Textbox("0, 0.25, 0.5, 0.75, 1", label="radii"),
        ],
        outputs=gr.JSON(label="certified accuracy"),
        title="Certified accuracy",
        description="Share of all images whose prediction is right and certified at each radius; -1 abstains.",
    ).launch()
