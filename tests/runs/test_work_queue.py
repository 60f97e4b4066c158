import threading
import time

import pytest
from accelerate import Accelerator

from hf_smoothing.runs.work_queue import WorkQueue


def queues(number):
    """As many processes of one run, in this one: they share a store."""
    found = [WorkQueue(Accelerator(cpu=True), "start") for _ in range(number)]
    for one in found:
        one.num_processes = number
        one.store = found[0].store
    return found


def test_every_item_goes_to_one_process_and_a_slow_one_gets_less():
    taken = {0: [], 1: [], 2: []}

    def work(rank, queue):
        for item in queue.take(iter(range(60)), 0.25):
            taken[rank].append(item)
            time.sleep(0.02 if rank == 0 else 0.002)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(queues(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item for items in taken.values() for item in items) == list(range(60))
    assert all(items == sorted(items) for items in taken.values())
    assert len(taken[0]) < 20
    # the counter of another noise level starts at 0
    assert list(queues(1)[0].take("abc", 0.5)) == ["a", "b", "c"]


def test_what_all_have_done():
    one, other = queues(2)
    one.count(0.25, True, 30)
    one.count(0.25, False, 20)
    other.count(0.25, True, 5)
    one.finish()
    assert not one.all_finished()
    other.finish()
    assert one.all_finished()
    assert [one.total(name) for name in ("images 0.25", "right 0.25", "draws")] == [3, 2, 55]


def test_nobody_waits_for_a_process_that_failed():
    one, other = queues(2)
    one.finish()
    other.fail(OSError(28, "No space left on device"))
    with pytest.raises(RuntimeError, match=r"Another process failed .*No space left"):
        one.all_finished()
