"""Runs on several hosts: network namespaces of this machine, and processes whose folders differ."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers.finished_runs import rows
from helpers.paths import ROOT

OPTIONS = ("--sigma", "0.25", "--max_draws", "60", "--seed", "0")


@pytest.fixture
def hosts():
    """Two hosts with a network of their own; each is a prefix for a command."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need `ip` (iproute2)")
    names = [f"smoothing-{os.getpid()}-{number}" for number in (1, 2)]
    setup = [
        *(["netns", "add", name] for name in names),
        ["link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1]],
    ]
    for number, name in enumerate(names, 1):
        setup += [["-n", name, "address", "add", f"10.199.0.{number}/24", "dev", "eth0"]]
        setup += [["-n", name, "link", "set", device, "up"] for device in ("lo", "eth0")]
    try:
        for words in setup:
            done = subprocess.run(["ip", *words], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def certify_on(hosts, prefixes, *options):
    """Start one process on each host, as a user would; returns exit status and output of each."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*host, *prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
             "--node_rank", str(rank), "--master_addr", "10.199.0.1", "--master_port", "29500", "--",
             str(ROOT / "scripts" / "certify.py"), *OPTIONS, *map(str, options)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, (host, prefix) in enumerate(zip(hosts, prefixes))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs)]


@pytest.mark.slow
def test_two_hosts_give_the_records_of_one_process(hosts, certify, model, parquet, tmp_path):
    certify(tmp_path / "one", seed=0)
    data = ("--model_name_or_path", model, "--dataset_name", parquet)
    for status, output in certify_on(hosts, [(), ()], *data, "--output_dir", tmp_path / "two"):
        assert status == 0, output
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    shards = sorted((tmp_path / "two" / "shards").glob("*.jsonl"))
    assert len(shards) == 2
    assert all(shard.read_bytes().count(b"\n") > 20 for shard in shards)


@pytest.mark.slow
def test_hosts_that_do_not_share_the_folder_are_refused(hosts, model, parquet, tmp_path):
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    own_disk = ("sh", "-c", f'mount -t tmpfs tmpfs "{output_dir}" && exec "$@"', "sh")
    data = ("--model_name_or_path", model, "--dataset_name", parquet)
    for status, output in certify_on(hosts, [(), own_disk], *data, "--output_dir", output_dir):
        assert status != 0
        assert "is not the same folder for all processes" in output
    assert not list(output_dir.iterdir())


def test_processes_with_different_folders_are_refused_before_anything_is_loaded(processes, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    started = processes.start_ranks(
        2, ROOT / "scripts" / "certify.py", "--model_name_or_path", "no/such-model", "--dataset_name", "no/such-data",
        "--output_dir", "run", *OPTIONS, cwds=folders,
    )  # fmt: skip
    for done in [process.finish(120) for process in started]:
        assert done.returncode == 1
        assert "error: output_dir='run' is not the same folder for all processes" in done.stderr
        assert "is not seen by process 1 on host" in done.stderr
    assert not any(list(folder.iterdir()) for folder in folders)
