import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest, norm

from hf_smoothing.core.certificates import ABSTAIN
from hf_smoothing.count_head.measured_counts import read_count_table

DRAWS = 1000


@pytest.fixture(scope="module")
def columns():
    generator = np.random.default_rng(0)
    counts = generator.multinomial(DRAWS, generator.dirichlet(np.full(10, 0.3), 120))
    return {"index": np.tile([3, 0, *range(10, 68)], 2), "sigma": np.repeat([0.5, 0.25], 60), "counts": counts}


@pytest.fixture
def write(tmp_path, columns):
    def call(**changes):
        path = tmp_path / "counts.parquet"
        content = {name: list(column) for name, column in {**columns, **changes}.items() if column is not None}
        pq.write_table(pa.table(content), path)
        return path

    return call


def test_a_table_is_read_with_the_labels_of_its_dataset(write, columns, parquet, demo_images):
    counts = read_count_table(write(), parquet, "test")
    assert counts.indices.tolist() == columns["index"].tolist()
    np.testing.assert_array_equal(counts.counts, columns["counts"])
    label_column = counts.settings["label_column"]
    assert counts.labels.tolist() == [demo_images[int(index)][label_column] for index in columns["index"]]
    for row, prediction, p_lower in zip(columns["counts"], counts.predictions, counts.p_lower):
        # one side at .001 is two sides at .002
        expected = binomtest(int(row.max()), DRAWS).proportion_ci(0.998, method="exact").low
        assert p_lower == pytest.approx(expected)
        assert prediction == (row.argmax() if expected > 0.5 else ABSTAIN)
    assert {ABSTAIN} < set(counts.predictions.tolist())
    assert "60 images, index 0 to 67" in counts.describe_images()
    assert counts.open_images().class_names == counts.settings["label_names"]


def test_some_of_the_levels_are_selected(write, columns, parquet):
    counts = read_count_table(write(), parquet, "test").select_sigmas([0.25])
    assert counts.indices.tolist() == columns["index"][60:].tolist()
    np.testing.assert_array_equal(counts.counts, columns["counts"][60:])
    assert counts.settings["sigmas"] == [0.25]
    with pytest.raises(ValueError, match=r"sigmas=0.3, 0.5: these noise levels were not counted, only 0.25"):
        counts.select_sigmas([0.3, 0.5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "counts.parquet .*sigma"),
        ({"index": np.arange(120) + 100}, "index 219, but the split 'test' .* has 200 images"),
        ({"index": np.arange(120) - 1}, "index -1, but"),
        ({"counts": np.full((120, 3), 5)}, "counts of 3 classes, but .* has 10"),
        ({"counts": [np.full(10, 5)] * 119 + [np.full(10, 6)]}, "50 to 60 draws"),
        ({"counts": [np.full(10, 5)] * 119 + [np.full(9, 5)]}, "9 to 10 classes"),
        ({"index": np.zeros(120, int)}, "several rows for an image and noise level"),
        ({"index": [], "sigma": [], "counts": pa.array([], pa.list_(pa.int64()))}, "no rows"),
    ],
)
def test_tables_that_do_not_fit_are_refused(write, parquet, changes, message):
    with pytest.raises(ValueError, match=message):
        read_count_table(write(**changes), parquet, "test")


def test_a_file_that_is_no_table_is_refused(tmp_path, parquet):
    path = tmp_path / "counts.parquet"
    path.write_text("no table")
    with pytest.raises(ValueError, match=r"counts.parquet is no Parquet file"):
        read_count_table(path, parquet, "test")
    with pytest.raises(ValueError, match=r"absent.parquet is no Parquet file"):
        read_count_table(tmp_path / "absent.parquet", parquet, "test")


def test_the_script_trains_on_a_table(write, parquet, model, tmp_path, processes):
    command = ["scripts/train_count_head.py", "--model_name_or_path", model, "--counts", write()]
    refused = processes.run(*command, "--output_dir", tmp_path / "refused")
    assert refused.returncode == 1
    assert "give dataset_name and split" in refused.stderr
    options = ["--dataset_name", parquet, "--split", "test", "--sigmas", "0.25", "--num_train_epochs", "1"]
    options += ["--per_device_train_batch_size", "10", "--own_backbone", "--eval_share", "0.2"]
    done = processes.run(*command, *options, "--output_dir", tmp_path / "head")
    assert done.returncode == 0, done.stderr
    training = json.loads((tmp_path / "head" / "results" / "training.json").read_text())
    assert training["images_counted"] == 60
    assert training["counts"]["sigmas"] == [0.25]
    assert json.loads((tmp_path / "head" / "config.json").read_text())["count_sigmas"] == [0.25]


def test_counts_become_logs_of_certificates(write, columns, parquet, processes, tmp_path):
    table = write(original_index=[2 * index for index in columns["index"]])
    script = "scripts/studies/counts_to_logs.py"
    done = processes.run(
        script, "--counts", table, "--dataset_name", parquet, "--every", 20, "--output_dir", tmp_path / "logs"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = read_count_table(table, parquet, "test")
    lines = (tmp_path / "logs" / "cohen-resnet110-sigma_0.25.log").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    assert [int(row[0]) for row in rows] == sorted(
        2 * index for index in set(columns["index"].tolist()) if index % 10 == 0
    )
    place = int(np.flatnonzero((counts.indices == int(rows[1][0]) // 2) & (counts.sigmas == 0.25))[0])
    radius = 0.25 * norm.ppf(counts.p_lower[place]) if counts.predictions[place] >= 0 else 0
    assert [float(value) for value in rows[1][1:4]] == pytest.approx(
        [counts.labels[place], counts.predictions[place], radius], rel=1e-5
    )
