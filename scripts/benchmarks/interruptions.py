"""Kill dataset runs at random moments, resume them each time, and count the records that are lost, doubled or changed.

    python scripts/benchmarks/interruptions.py --output model_cards/mixed-noise-vit-nano-cifar10/results/kills.json

A run certifies the shipped pictures at several noise levels with a small untrained classifier. Its processes (one, or two
of a group) get SIGKILL while they start, while they write records, or while they merge them; the next ones resume the run.
Finished runs are compared with one that was never interrupted.
"""

import argparse
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import ViTImageProcessor

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification, load_demo_images
from hf_smoothing.runs.dataset_run import certify_dataset
from hf_smoothing.runs.records import read_shards
from hf_smoothing.runs.settings import RunSettings
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.processes import start_processes
from hf_smoothing.utils.provenance import command_line, package_versions

SIGMAS = [level / 20 for level in range(1, 11)]
MOMENTS = ("start", "start", "records", "records", "records", "merge")
"""When a process is killed, drawn at random. Merging only counts where all records are there."""

processes = multiprocessing.get_context("forkserver")


def save_classifier(folder: Path) -> str:
    """A small untrained classifier of the shipped pictures."""
    names = load_demo_images().features["label"].names
    config = MixedNoiseViTConfig(
        image_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
    )  # fmt: skip
    MixedNoiseViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False).save_pretrained(folder)
    return str(folder)


def certify(settings: RunSettings, folder: Path, environment: dict[str, str]) -> None:
    """What a process does: start the run in the folder, or resume it."""
    os.environ.update(environment)
    with (folder.parent / "output.txt").open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    certify_dataset(settings, folder, accelerator=start_processes(), batch_size=64)
    sys.stderr.flush()
    os._exit(0)  # tearing modules down takes longer than the run


def start(settings: RunSettings, folder: Path, num_processes: int) -> list[Any]:
    """Start the processes of a run."""
    group: dict[str, str] = {}
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        group |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    started = []
    for rank in range(num_processes):
        environment = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if group else {}
        started.append(processes.Process(target=certify, args=(settings, folder, environment)))
        started[-1].start()
    return started


def count_lines(folder: Path) -> int:
    return sum(shard.read_bytes().count(b"\n") for shard in folder.glob("shards/*.jsonl"))


def wait_for_moment(moment: str, started: list[Any], folder: Path, total: int, seconds: float) -> None:
    """Wait until a random moment of the kind `moment`, or until the processes end by themselves."""
    lines = {"start": 0, "records": count_lines(folder) + random.randrange(1, 40), "merge": total}[moment]
    while count_lines(folder) < min(lines, total) and any(process.is_alive() for process in started):
        time.sleep(0.002)
    time.sleep(random.random() * {"start": seconds, "records": 0.02, "merge": 0.1}[moment])


def kill(started: list[Any]) -> int:
    """Kill the processes, one of them a bit earlier than the others; returns how many did not end by themselves."""
    for process in random.sample(started, len(started)):
        process.kill()
        time.sleep(0.02 * random.random())
    for process in started:
        process.join()
    return sum(process.exitcode == -9 for process in started)


def read_rows(folder: Path) -> dict[tuple[float, int], dict[str, Any]]:
    rows = pq.read_table(folder / "certificates.parquet").to_pylist()
    return {(row["sigma"], row["index"]): {**row, "seconds": None} for row in rows}


def compare(folder: Path, expected: dict[tuple[float, int], dict[str, Any]]) -> Counter[str]:
    """How many records of a finished run are lost, doubled (in shards or table), or changed."""
    lines = Counter((row["sigma"], row["index"]) for row in read_shards(folder / "shards"))
    rows = read_rows(folder)
    return Counter(
        lost=len(expected.keys() - rows.keys()),
        doubled=sum(lines.values())
        - len(lines)
        + pq.read_metadata(folder / "certificates.parquet").num_rows
        - len(rows),
        changed=sum(row != expected.get(key) for key, row in rows.items()),
        records=len(rows),
    )


def interrupt_runs(settings: RunSettings, folder: Path, kills: int) -> dict[str, Any]:
    """Interrupt and resume runs until so many processes were killed, and compare each finished run."""
    started = start(settings, folder / "uninterrupted", 1)
    began = time.monotonic()
    while not count_lines(folder / "uninterrupted") and started[0].is_alive():
        time.sleep(0.002)
    seconds = time.monotonic() - began
    started[0].join()
    expected = read_rows(folder / "uninterrupted")
    totals, killed, most, runs = Counter[str](), Counter[str](), 0, 0
    while killed.total() < kills:
        run, of_run = folder / f"run{runs}", 0
        runs += 1
        finished = False
        while not finished:
            started = start(settings, run, random.choice((1, 1, 1, 2)))
            moment = random.choice(MOMENTS)
            if moment == "merge" and count_lines(run) < len(expected) * 0.9:
                moment = "records"  # waiting for the end would leave little to interrupt
            if killed.total() >= kills:
                for process in started:
                    process.join()
            else:
                wait_for_moment(moment, started, run, len(expected), seconds)
            ended = kill(started)
            killed[moment], of_run = killed[moment] + ended, of_run + ended
            statuses = {process.exitcode for process in started}
            if statuses - {0, -9} and -9 not in statuses:  # where one of them was killed, another one may fail
                raise RuntimeError(f"A process ended with {statuses}: {(folder / 'output.txt').read_text()[-3000:]}")
            finished = statuses == {0}
        totals += compare(run, expected)
        most = max(most, of_run)
        print(f"{runs} runs, {killed.total()} killed, {dict(totals)}", flush=True)
    names = ("records", "lost", "doubled", "changed")
    return {"kills": killed.total(), "killed_during": dict(killed), "runs": runs, "most_kills_of_a_run": most} | {
        name: totals[name] for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="number of processes to kill")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    random.seed(args.seed)
    processes.set_forkserver_preload(["hf_smoothing.runs.dataset_run", "hf_smoothing", "torchvision", "__main__"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ |= {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        dataset = str(files("hf_smoothing.data") / "cifar10_demo.parquet")
        settings = RunSettings(save_classifier(folder / "model"), dataset, SIGMAS, max_draws=32, seed=0)
        results = interrupt_runs(settings, folder, args.kills)
    print(results)
    if args.output is not None:
        content = {"command": command_line(), "versions": package_versions("datasets", "accelerate"), **results}
        write_json({**content, "seed": args.seed}, args.output)
    sys.exit(any(results[name] for name in ("lost", "doubled", "changed")))


if __name__ == "__main__":
    main()
