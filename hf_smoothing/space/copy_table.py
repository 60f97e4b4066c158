"""
Copies the columns of a table of certificates that the page shows, under limits of memory and rows.

Run as a script, in a process of its own: `python copy_table.py SOURCE TARGET BYTES ROWS`. A small compressed file can hold a
very large table; reading it must not take the memory of the page. It imports nothing of the package, to start quickly.
"""

import resource
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_INTEGERS = ("index", "label", "prediction", "seed", "num_samples")
_NUMBERS = ("radius", "alpha", "sigma", "delta", "p_lower")
_REQUIRED = ("index", "label", "prediction", "radius")
_TEXTS = ("guarantee", "norm", "noise_resolution", "denoiser")
COLUMNS = {
    **{name: pa.int64() for name in _INTEGERS},
    **{name: pa.float64() for name in _NUMBERS},
    **{name: pa.string() for name in _TEXTS},
}
"""The columns that are copied, where the table has them, and their types."""


def copy_table(source: Path, target: Path, most_bytes: int, most_rows: int) -> None:
    """
    Copy a table.

    Raises:
        ValueError: for what is no Parquet, lacks columns or has them in other types, has too many rows, or is too large
            without compression.
    """
    file = pq.ParquetFile(source)
    if file.metadata.num_rows > most_rows:
        raise ValueError(f"it has more than {most_rows:,} rows")
    names = [name for name in file.schema_arrow.names if name in COLUMNS]
    if missing := [name for name in _REQUIRED if name not in names]:
        raise ValueError(f"it lacks the columns {missing}")
    schema = pa.schema({name: COLUMNS[name] for name in names})
    table = file.read(columns=names, use_threads=False).cast(schema)  # no dictionaries: the size is that of all values
    if table.nbytes > most_bytes // 4:
        raise ValueError("it is too large")
    pq.write_table(table, target)


def main() -> None:
    """Copy as the arguments say; what is wrong with the table goes to stderr, with exit code 1."""
    source, target, most_bytes, most_rows = sys.argv[1:]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(most_bytes),) * 2)
    try:
        copy_table(Path(source), Path(target), int(most_bytes), int(most_rows))
    except MemoryError:
        sys.exit("it is too large")
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        sys.exit(str(error))


if __name__ == "__main__":
    main()
