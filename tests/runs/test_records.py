import json

import pyarrow.parquet as pq
import pytest

from hf_smoothing import Certificate, GaussianNoise, SequentialRule, SmoothedClassifier
from hf_smoothing.runs.records import SCHEMA, ShardWriter, error_record, read_shards, record, repair, write_parquet

NAMES = ["cat", "dog"]


def certificate(prediction, radius):
    return Certificate(
        prediction=prediction, radius=radius, guarantee="per_input", method="sequential", noise="gaussian", norm="l2",
        sampling="lattice", sigma=0.25, alpha=0.001, p_lower=0.9, p_upper=0.1, counts=(3, 1), num_samples=5, seed=0,
        dtype="float32",
    )  # fmt: skip


def test_a_record_is_flat_and_json(linear):
    row = record(7, 0, NAMES, certificate(1, 0.25))
    assert list(row) == SCHEMA.names
    assert (row["index"], row["label_name"], row["prediction_name"], row["error"]) == (7, "cat", "dog", None)
    assert record(7, 1, NAMES, certificate(-1, 0.0))["prediction_name"] is None
    smoothed = SmoothedClassifier(linear, GaussianNoise(0.5))
    broken = error_record(8, 1, NAMES, smoothed, SequentialRule((0.5,)), 3, "no picture")
    assert list(broken) == SCHEMA.names
    assert (broken["sigma"], broken["seed"], broken["num_samples"], broken["radius"]) == (0.5, 3, 0, None)
    json.dumps([row, broken])


def test_shards_become_one_table(tmp_path):
    shards = [ShardWriter(tmp_path / f"records-rank{rank}.jsonl") for rank in (0, 1)]
    for index in (5, 2, 9, 1):
        shards[index % 2].write(record(index, 0, NAMES, certificate(1, 0.1 + 0.2)))
    for shard in shards:
        shard.close()
    write_parquet(read_shards(tmp_path), tmp_path / "certificates.parquet")
    table = pq.read_table(tmp_path / "certificates.parquet")
    assert table.schema.equals(SCHEMA)
    assert table["index"].to_pylist() == [1, 2, 5, 9]
    assert set(table["radius"].to_pylist()) == {0.1 + 0.2}  # full precision
    assert not list(tmp_path.glob(".*part"))


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    shard = tmp_path / "records-rank0.jsonl"
    shard.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    repair(shard)
    with pytest.raises(ValueError, match=r"records-rank0\.jsonl, line 2, is not a record"):
        list(read_shards(tmp_path))


@pytest.mark.parametrize(
    ("torn", "left"),
    [
        (b'{"a": 1}\n{"a": 2}\n', b'{"a": 1}\n{"a": 2}\n'),
        (b'{"a": 1}\n{"a": 2}', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"a"', b'{"a": 1}\n'),
        (b'{"a": 1}\n\0\0\0\0\n\0', b'{"a": 1}\n'),  # after a power cut
        (b"\n", b""),
        (b'{"a"', b""),
        (b"", b""),
    ],
)
def test_a_torn_line_is_dropped(tmp_path, torn, left):
    shard = tmp_path / "records-rank00000.jsonl"
    shard.write_bytes(torn)
    repair(shard)
    assert shard.read_bytes() == left


def test_one_writer_a_shard(tmp_path):
    first = ShardWriter(tmp_path / "records-rank0.jsonl")
    for use in (ShardWriter, repair):
        with pytest.raises(ValueError, match="being written by another process"):
            use(tmp_path / "records-rank0.jsonl")
    first.close()
    repair(tmp_path / "records-rank0.jsonl")
