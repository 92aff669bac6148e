"""Reward functions that misbehave: each is named, its batch fails or is skipped as configured, and the next runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from grpo.errors import UserError
from grpo.rewards.runtime.contract import RewardSpec
from tests.helpers.reward_pools import Pools, batch, error_of, wait_until


@pytest.fixture
def pools() -> Iterator[Pools]:
    with Pools() as made:
        yield made


STOPPING = {"raises", "returns_text", "sleeps", "exits"}


def hoarding():
    def hoards(completions):
        kept = []
        while True:
            kept.append(bytearray(10**7))

    return hoards


def misbehaviours():
    """Functions that misbehave, and what is said of them."""

    def raises(completions):
        return [1 / 0]

    def deep(completions):
        return [float("one") for _ in completions]

    def returns_text(completions):
        return ["good"] * len(completions)

    def returns_nan(completions):
        return [1.0, float("nan"), 1.0]

    def returns_too_few(completions):
        return [1.0]

    def sleeps(completions):
        time.sleep(60)

    def spins_in_c(completions):
        return [re.match(r"(a|aa)+$", "a" * 200 + "b")]

    def exits(completions):
        os._exit(3)

    def leaves(completions):
        sys.exit("enough")

    def crashes(completions):
        import ctypes

        ctypes.string_at(0)

    def killed(completions):
        os.kill(os.getpid(), signal.SIGKILL)

    def blocks_the_loop():
        async def blocks(completions):
            time.sleep(60)

        return blocks

    here = r"test_reward_faults\.py:\d+"
    return [
        (raises, rf"reward 'raises' \(.*{here}\) raised ZeroDivisionError: division by zero at .*{here}"),
        (deep, rf"raised ValueError: could not convert string to float: 'one' at .*{here}"),
        (
            returns_text,
            rf"'returns_text' \(.*{here}\) returned 'good' \(str\) for completion 1 of 3; return one finite number",
        ),
        (returns_nan, r"returned nan \(float\) for completion 2 of 3"),
        (returns_too_few, "returned 1 values for 3 completions"),
        (sleeps, "'sleeps' .* did not return within its timeout of 0.5 s"),
        (spins_in_c, "did not return within its timeout of 0.5 s"),
        (exits, r"reward 'exits' \(.*\): its process ended itself with exit code 3 during a call"),
        (leaves, "raised SystemExit: enough at"),
        (crashes, "its process was ended by signal 11"),
        (killed, r"was killed \(SIGKILL\), most likely because the machine ran out of memory, during a call"),
        (blocks_the_loop(), "did not return within its timeout of 0.5 s"),
    ]


def test_misbehaving_functions_are_named_and_skipped_and_can_be_called_again(pools):
    functions = {function.__name__: (function, sentence) for function, sentence in misbehaviours()}
    specs = [RewardSpec(function, timeout=0.5, on_error="skip") for function, _ in functions.values()]
    specs = [*specs, RewardSpec(hoarding(), on_error="skip", memory_limit_gb=0.2)]
    functions["hoards"] = (None, r"ran out of the 0.2 GB of memory that it may use at .*test_reward_faults\.py:\d+$")
    pool = pools(*specs, "correctness")
    for _ in range(2):
        result = pool.submit(batch()).result(timeout=60)
        said = {line.partition(": ")[0]: line for line in pools.lines if ": skipped 3 completions: reward '" in line}
        pools.lines.clear()
        for name, (_, sentence) in functions.items():
            assert result.scores[name] == [None] * 3
            assert result.metrics[f"rewards/{name}/errors"] == 1.0
            assert re.search(sentence, said[name]), said[name]
        assert result.scores["correctness"] == [2.0] * 3
        assert max(result.seconds.values()) < 20


@pytest.mark.parametrize(
    ("function", "sentence"),
    [pytest.param(*case, id=case[0].__name__) for case in misbehaviours() if case[0].__name__ in STOPPING],
)
def test_a_misbehaving_function_stops_the_run_with_a_remedy(pools, function, sentence):
    pool = pools(RewardSpec(function, timeout=0.5), "correctness")
    for _ in range(2):
        message = error_of(pool)
        assert re.search(sentence, message), message
        assert 'set on_error = "skip" to score such batches as missing' in message


def test_a_hanging_function_shows_where_it_hangs(pools):
    def hangs(completions):
        return re.match(r"(a|aa)+$", "a" * 200 + "b")  # holds the interpreter's lock for ever

    error_of(pools(RewardSpec(hangs, timeout=0.3)))
    assert any(re.search(r'test_reward_faults\.py", line \d+ in hangs', line) for line in pools.lines), pools.lines


def test_the_traceback_is_shown_when_a_function_raises(pools):
    def inner():
        raise KeyError("answer")

    def outer(completions):
        return inner()

    error_of(pools(outer))
    assert any("in outer" in line for line in pools.lines) and any("in inner" in line for line in pools.lines)


def test_a_process_is_replaced_after_it_died_and_starts_afresh(pools):
    def fragile(completions, how):
        fragile.calls = getattr(fragile, "calls", 0) + 1
        if how[0] == "die":
            os._exit(1)
        return [fragile.calls]

    pool = pools(RewardSpec(fragile, on_error="skip"))
    hows = ["live", "live", "die", "live", "live"]
    futures = [pool.submit(batch(1, how=[how])) for how in hows]
    assert [future.result(timeout=20).scores["fragile"] for future in futures] == [[1.0], [2.0], [None], [1.0], [2.0]]


def test_dying_between_calls_costs_no_call(pools):
    def leaves_a_bomb(completions):
        threading.Timer(0.1, os._exit, [7]).start()
        return [1.0] * len(completions)

    pool = pools(leaves_a_bomb)
    for _ in range(2):
        assert pool.submit(batch()).result(timeout=20).scores == {"leaves_a_bomb": [1.0] * 3}
        assert wait_until(lambda: any("exit code 7 between calls" in line for line in pools.lines))
        pools.lines.clear()


def test_a_failed_batch_does_not_stop_those_behind_it(pools):
    def picky(completions, answer):
        assert answer[0] != "1", "not this one"
        return [1.0] * len(completions)

    pool = pools(picky)
    futures = [pool.submit(batch(1, answer=[str(number)])) for number in range(3)]
    assert futures[0].result(timeout=20).scores == futures[2].result(timeout=20).scores == {"picky": [1.0]}
    with pytest.raises(UserError, match="AssertionError: not this one"):
        futures[1].result()


def test_a_failure_is_reported_without_waiting_for_the_others(pools):
    def fails(completions):
        raise ValueError

    def slow(completions):
        time.sleep(30)

    start = time.monotonic()
    error_of(pools(slow, fails))
    assert time.monotonic() - start < 5


def test_processes_that_a_function_started_end_with_it(pools):
    def starts_another(completions):
        child = subprocess.Popen(["sleep", "1000"])
        print(child.pid)
        time.sleep(1000)

    error_of(pools(RewardSpec(starts_another, timeout=0.3)))
    child = int(pools.lines[0].removeprefix("starts_another: "))
    assert wait_until(lambda: not psutil.pid_exists(child))
