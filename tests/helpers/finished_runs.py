"""Small finished runs and logs, to report on."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_smoothing import GaussianNoise

NAMES = ["cat", "dog", "frog"]


def rows(folder):
    """The records of a run, without the time that they took."""
    return [{**row, "seconds": None} for row in pq.read_table(Path(folder) / "certificates.parquet").to_pylist()]


def write_run(
    folder, sigmas=(0.25,), model="user/model", guarantee="per_input", radii=(), images=60, seed=0, method=None,
    alpha=0.001, sampling=None,
):  # fmt: skip
    """
    A finished run: every 20th image, the third one undecodable. The settings name `radii` and the `method`, if any.
    `sampling` is that of the certificates in turn, if known.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for sigma in sigmas:
        for position in range(images):
            label = position % 3
            row = {"index": 20 * position, "label": label, "label_name": NAMES[label], "sigma": sigma, "error": "torn"}
            row |= {"num_samples": 0, "seconds": 0.1, "norm": "l2", "alpha": alpha}
            if position != 2:
                hits = generator.beta(5, 1)
                counts = np.roll(generator.multinomial(200, [hits, (1 - hits) * 0.7, (1 - hits) * 0.3]), label)
                if counts[label] == 200:  # draws that all agree leave larger radii open
                    counts += np.roll([-1, 1, 0], label)
                prediction = int(counts.argmax()) if counts.max() > 120 else -1
                p_lower = counts.max() / 200 - 0.05 if prediction >= 0 else 0.0
                row |= {
                    "error": None,
                    "prediction": prediction,
                    "prediction_name": NAMES[prediction] if prediction >= 0 else None,
                    "radius": GaussianNoise(sigma).radius(p_lower) if prediction >= 0 else 0.0,
                    "guarantee": guarantee,
                    "alpha": alpha,
                    "counts": counts.tolist(),
                    "p_lower": p_lower,
                    "num_samples": int(generator.integers(20, 2000)),
                    "norm": "l2",
                    "seconds": 0.5,
                }
                if sampling:
                    row["sampling"] = sampling[position % len(sampling)]
            rows.append(row)
    folder.mkdir()
    fullest = max(rows, key=len)
    pq.write_table(
        pa.table({name: [row.get(name) for row in rows] for name in fullest}), folder / "certificates.parquet"
    )
    settings = {"model_name_or_path": model, "radii": list(radii) or None} | ({"method": method} if method else {})
    run = {"command": "scripts/certify.py", "settings": settings, "versions": {"torch": "2"}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


LOG = """idx\tlabel\tpredict\tradius\tcorrect\ttime
0\t3\t3\t0.747\t1\t0:00:17.341
20\t8\t1\t0.35\t0\t0:00:16.2
40\t0\t-1\t0.0\t0\t0:01:00
60\t6\t6\t0.25\t1\t0:00:16.000001
"""


def write_log(path, text=LOG):
    path.write_text(text)
    return path
