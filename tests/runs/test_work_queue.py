import threading
import time

import pytest
from accelerate import Accelerator

from hf_smoothing.runs.work_queue import WorkQueue


def make_queues(number):
    """As many processes of one run, in this one: they share a store."""
    queues = [WorkQueue(Accelerator(cpu=True), "start") for _ in range(number)]
    for queue in queues:
        queue.num_processes = number
        queue.store = queues[0].store
    return queues


def test_every_item_goes_to_one_process_and_a_slow_one_gets_less():
    taken = {0: [], 1: [], 2: []}

    def work(rank, queue):
        for item in queue.take(iter(range(60)), 0.25):
            taken[rank].append(item)
            time.sleep(0.02 if rank == 0 else 0.002)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(make_queues(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item for items in taken.values() for item in items) == list(range(60))
    assert all(items == sorted(items) for items in taken.values())
    assert len(taken[0]) < 20
    # the counter of another noise level starts at 0
    assert list(make_queues(1)[0].take("abc", 0.5)) == ["a", "b", "c"]


def test_what_all_have_done():
    first, second = make_queues(2)
    first.count(0.25, True, 30)
    first.count(0.25, False, 20)
    second.count(0.25, True, 5)
    first.finish()
    assert not first.all_finished()
    second.finish()
    assert first.all_finished()
    assert [first.total(name) for name in ("images 0.25", "right 0.25", "draws")] == [3, 2, 55]


def test_nobody_waits_for_a_process_that_failed():
    first, second = make_queues(2)
    first.finish()
    second.fail(OSError(28, "No space left on device"))
    with pytest.raises(RuntimeError, match=r"Another process failed .*No space left"):
        first.all_finished()
