"""Which columns of a dataset hold the images and the labels."""

from collections.abc import Collection, Sequence

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def find_column(columns: Collection[str], usual_names: Sequence[str], chosen: str | None, flag: str) -> str:
    """
    The column that the user chose, or the one with a usual name.

    Raises a `ValueError` where there is no such column, or several have usual names; it names the `flag` to choose with.
    """
    candidates = [name for name in columns if name in ((chosen,) if chosen is not None else usual_names)]
    if len(candidates) == 1:
        return candidates[0]
    if chosen is not None:
        problem = f"There is no column {chosen!r}"
    elif candidates:
        problem = f"Several columns have usual names ({', '.join(candidates)})"
    else:
        problem = f"No column has a usual name ({', '.join(usual_names)})"
    raise ValueError(f"{problem}; the dataset has: {', '.join(columns)}. Choose one with {flag}.")
