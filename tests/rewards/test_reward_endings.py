"""The end of a reward pool, however it comes: nothing of it stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from grpo.errors import UserError
from grpo.rewards.runtime.contract import RewardSpec
from grpo.rewards.runtime.pool import RewardPool
from grpo.rewards.runtime.runner import how_it_ended, machine_memory
from tests.helpers.paths import ROOT
from tests.helpers.reward_pools import batch, children, counting, wait_until


def test_two_hundred_calls_and_ten_deaths_leave_no_process_thread_or_handle():
    def fine(completions):
        return [1.0] * len(completions)

    async def fine_too(completions):
        return [1.0] * len(completions)

    def mortal(completions, number):
        if number[0] % 20 == 7:
            os._exit(1)
        return [1.0] * len(completions)

    process = psutil.Process()
    RewardPool(["integer"]).close()  # what the first use leaves for good is not a leak
    before = (process.num_fds(), threading.active_count(), len(children()))
    with RewardPool([fine, fine_too, RewardSpec(mortal, on_error="skip")], on_output=lambda *line: None) as pool:
        futures = [pool.submit(batch(1, number=[number])) for number in range(200)]
        results = [future.result(timeout=60) for future in futures]
        assert len(children()) <= 3
    assert sum(result.metrics["rewards/mortal/errors"] for result in results) == 10
    assert (process.num_fds(), threading.active_count(), len(children())) == before
    pool.close()  # a second time does nothing
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(batch())


def test_closing_ends_running_and_waiting_calls_soon():
    def stuck(completions):
        time.sleep(1000)

    pool = RewardPool([stuck, "correctness"])
    futures = [pool.submit(batch()) for _ in range(3)]
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 5
    for future in futures:
        with pytest.raises(UserError, match="was closed"):
            future.result(timeout=0)
    assert not children()


def test_a_callback_may_close_the_pool():
    pool = RewardPool(["integer", counting()])
    closed = threading.Event()

    def close(future):
        pool.close()
        closed.set()

    pool.submit(batch()).add_done_callback(close)
    assert closed.wait(20)
    assert wait_until(lambda: not children())


SCRIPT = """
import sys, time, os
from grpo.rewards.runtime.contract import RewardBatch
from grpo.rewards.runtime.pool import RewardPool

def stuck(completions):
    import os, re
    print(os.getpid(), flush=True)
    re.match(r"(a|aa)+$", "a" * 200 + "b")

def idle(completions):
    print(os.getpid(), flush=True)
    return [1.0]

if __name__ == "__main__":
    pool = RewardPool([stuck, idle])
    pool.submit(RewardBatch(["q"], ["a"], [[1]], {}))
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path):
    """Runs SCRIPT and gives its process and its workers' ids."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = []

    def run(seconds: float) -> tuple[subprocess.Popen, list[int]]:
        command = [sys.executable, str(tmp_path / "script.py"), str(seconds)]
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(parent)
        return parent, [int(parent.stdout.readline()) for _ in range(2)]

    yield run
    for parent in started:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_workers_die_with_a_killed_trainer_even_inside_a_c_call(script):
    parent, workers = script(1000)
    assert all(psutil.pid_exists(pid) for pid in workers)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers))


def test_a_trainer_that_forgets_to_close_ends_all_the_same(script):
    parent, workers = script(0.1)
    assert parent.wait(timeout=20) == 0
    assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers))


def test_a_pool_that_is_dropped_ends_its_processes():
    pool = RewardPool(["integer"])
    assert len(children()) == 1
    del pool
    assert wait_until(lambda: not children())


def test_memory_and_endings_in_words():
    assert 1 << 28 < machine_memory() <= psutil.virtual_memory().total
    assert how_it_ended(0) == "ended itself with exit code 0"
    assert how_it_ended(-11) == "was ended by signal 11 (Segmentation fault)"
