"""The reward pool: functions in processes of their own, what they may rely on there, and how they are started.

What goes wrong in them is `test_reward_faults.py`'s, how they end `test_reward_endings.py`'s.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.rewards.runtime.contract import RewardSpec
from grpo.rewards.runtime.pool import RewardPool
from tests.helpers.paths import ROOT
from tests.helpers.reward_pools import Pools, batch, children, counting


@pytest.fixture
def pools() -> Iterator[Pools]:
    with Pools() as made:
        yield made


SPAWNING = """
import multiprocessing
from pathlib import Path

HALF = 0.5

def half(text):
    return HALF * len(text) * (Path(__file__).suffix == ".py")

def halves(completions):
    with multiprocessing.get_context("{method}").Pool(1) as pool:
        return pool.map(half, completions)
"""

# Scoring


@pytest.mark.parametrize(("name", "method"), [("rw", "spawn"), ("my-rewards", "forkserver"), ("json", "spawn")])
def test_a_file_that_starts_processes_is_importable_in_them(pools, tmp_path, name, method):
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / f"{name}.py").write_text(SPAWNING.format(method=method))
    result = pools(RewardSpec(f"{folder / name}.py:halves", timeout=20)).submit(batch()).result(timeout=30)
    assert result.scores == {"halves": [0.5 * len("<answer>0</answer>")] * 3}


def test_functions_of_all_kinds_score_one_batch(pools, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("CALLS = 0\ndef mine(completions):\n    global CALLS\n    CALLS += 1\n    return [CALLS] * 3\n")

    async def per_sample(completion):
        await asyncio.sleep(0.01)
        return len(completion)

    def verl(solution_str, ground_truth, scale=1):
        return {"score": scale * (ground_truth in solution_str), "gold": ground_truth}

    pool = pools(
        {"function": "correctness", "weight": 0.0},  # weight 0 is computed like any other
        f"{file}:mine",
        RewardSpec(verl, options={"scale": 2}),
        per_sample,
        functools.partial(lambda completions, offset: [offset] * len(completions), offset=0.5),
        counting(),
        RewardSpec("length_penalty", options={"max_completion_length": 4, "soft_punish_cache": 2}),
    )
    for call in (1.0, 2.0):
        result = pool.submit(batch()).result(timeout=20)
        assert result.scores == {
            "correctness": [2.0] * 3,
            "mine": [call] * 3,
            "verl": [2.0] * 3,
            "per_sample": [18.0] * 3,
            "<lambda>": [0.5] * 3,
            "count": [call] * 3,
            "length_penalty": [0.0] * 3,
        }
        assert result.extras == {"verl/gold": ["0", "1", "2"]}
        assert set(result.seconds) == set(result.scores) and all(0 <= value < 5 for value in result.seconds.values())
        assert result.seconds["per_sample"] >= 0.01


def test_values_come_back_bit_for_bit(pools):
    def echo(completions, value):
        return value

    pool = pools(echo)

    @settings(max_examples=50)
    @given(values=st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)), max_size=5))
    def check(values):
        returned = pool.submit(batch(len(values), value=values)).result(timeout=20)
        assert [*map(repr, returned.scores["echo"])] == [*map(repr, values)]

    check()


def test_logs_come_back_as_plain_values(pools):
    import numpy as np

    def logging(completions, log_metric, log_extra, trainer_state):
        log_metric("at", trainer_state.global_step / trainer_state.max_steps)
        log_extra("kept", [{"a": (1, None)}, np.float32(0.5), {1}])
        log_extra("odd", ["\ud800", 10**30, float("inf")])
        return [0, 0, 0]

    result = pools(logging).submit(batch()).result(timeout=20)
    assert result.metrics == {"at": 0.1}
    assert result.extras == {"kept": [{"a": [1, None]}, 0.5, "{1}"], "odd": ["\ud800", 1e30, float("inf")]}


def test_columns_of_any_plain_shape_reach_the_function(pools):
    columns = {"entry": [{"a": [1, {"b": None}]}, "text", b"bytes"], "prompt": [1, 2, 3]}

    def check(completions, entry, **kwargs):
        return [float(repr(value) == wanted) for value, wanted in zip(entry, kwargs["wanted"], strict=True)]

    wanted = [repr(value) for value in columns["entry"]]
    assert pools(check).submit(batch(wanted=wanted, **columns)).result(timeout=20).scores["check"] == [1.0] * 3


def test_an_empty_batch_has_empty_scores(pools):
    def indexing(completions):
        return [float(len(completions[0]))] * len(completions)

    assert pools(indexing).submit(batch(0)).result(timeout=20).scores == {"indexing": []}


# Time and order


def test_submit_returns_at_once_and_functions_run_beside_each_other(pools):
    def slow(completions):
        time.sleep(0.6)
        return [1] * len(completions)

    def slower(completions):
        time.sleep(0.6)
        return [2] * len(completions)

    pool = pools(slow, slower)
    start = time.monotonic()
    future = pool.submit(batch())
    assert time.monotonic() - start < 0.2 and not future.done()
    assert future.result(timeout=20).scores == {"slow": [1.0] * 3, "slower": [2.0] * 3}
    assert time.monotonic() - start < 1.1


def test_every_function_sees_batches_in_one_order_whoever_submits(pools):
    def remember(seen):
        def order(completions, number):
            seen.append(number[0])
            return [float(len(seen))] * len(completions)

        return order

    pool = pools(RewardSpec(remember([]), name="one"), RewardSpec(remember([]), name="two"))
    futures = {}

    def submit(numbers):
        for number in numbers:
            futures[number] = pool.submit(batch(1, number=[number]))

    threads = [threading.Thread(target=submit, args=(range(start, 60, 3),)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = {number: future.result(timeout=20).scores for number, future in futures.items()}
    assert all(scores["one"] == scores["two"] for scores in places.values())
    assert sorted(scores["one"][0] for scores in places.values()) == [float(place) for place in range(1, 61)]
    for start in range(3):
        mine = [places[number]["one"][0] for number in range(start, 60, 3)]
        assert mine == sorted(mine)


def test_coroutine_functions_score_several_batches_at_once(pools):
    async def waiting(completions):
        await asyncio.sleep(0.5)
        return [1.0] * len(completions)

    pool = pools(waiting)
    start = time.monotonic()
    futures = [pool.submit(batch()) for _ in range(8)]
    assert all(future.result(timeout=20).scores == {"waiting": [1.0] * 3} for future in futures)
    assert time.monotonic() - start < 1.5


def test_a_late_coroutine_is_cancelled_alone(pools):
    async def sometimes(completions, delay):
        await asyncio.sleep(delay[0])
        return [os.getpid()]

    pool = pools(RewardSpec(sometimes, timeout=0.5))
    late, early = pool.submit(batch(1, delay=[60])), pool.submit(batch(1, delay=[0.1]))
    process = early.result(timeout=20).scores
    with pytest.raises(UserError, match="'sometimes' .* did not return within its timeout of 0.5 s; raise its timeout"):
        late.result(timeout=20)
    assert pool.submit(batch(1, delay=[0])).result(timeout=20).scores == process  # it was not replaced


def test_an_answer_that_lay_waiting_is_not_late(pools):
    """The trainer may be too busy to read an answer in time; the function was not slow for that."""

    def quick(completions):
        print("soon done")
        time.sleep(0.1)
        return [1.0] * len(completions)

    pool = pools(RewardSpec(quick, timeout=0.5), on_output=lambda name, line: time.sleep(1))
    for _ in range(2):
        assert pool.submit(batch()).result(timeout=20).scores == {"quick": [1.0] * 3}


# What a function may rely on


def test_alarms_work_because_the_function_has_the_main_thread(pools):
    def alarmed(completions):
        def ring(signum, frame):
            raise TimeoutError

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(10)
        except TimeoutError:
            return [1.0] * len(completions)

    assert pools(alarmed).submit(batch()).result(timeout=20).scores == {"alarmed": [1.0] * 3}


def test_the_worker_is_a_fresh_interpreter(pools):
    def look(completions, log_extra):
        log_extra("modules", [sorted(sys.modules)])
        log_extra("main", [hasattr(sys.modules["__main__"], "pytest")])
        paths = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        links = [os.readlink(path) for path in paths if os.path.islink(path)]
        log_extra("files", [[link for link in links if link.startswith("/") and link != "/dev/null"]])
        return [1.0]

    with open(ROOT / "pyproject.toml") as file:
        os.set_inheritable(file.fileno(), True)
        extras = pools(look).submit(batch(1)).result(timeout=20).extras
    assert not {"torch", "pydantic", "vllm", "numpy", "pytest"} & set(extras["modules"][0])
    assert extras["main"] == [False]
    assert extras["files"] == [[]]


def test_functions_of_a_module_made_at_run_time_travel_by_value(pools, tmp_path):
    module = types.ModuleType("made_in_a_notebook")
    exec("CALLS = 0\ndef count(completions):\n    global CALLS\n    CALLS += 1\n    return [CALLS]", module.__dict__)
    sys.modules[module.__name__] = module
    try:
        pool = pools(module.count)
    finally:
        del sys.modules[module.__name__]
    assert [pool.submit(batch(1)).result(timeout=20).scores["count"] for _ in range(2)] == [[1.0], [2.0]]
    assert module.CALLS == 0


def test_a_file_is_imported_in_its_process_only(pools, tmp_path):
    (tmp_path / "apart.py").write_text("import os\nPID = os.getpid()\ndef pid(completions):\n    return [PID]\n")
    pid = pools(f"{tmp_path}/apart.py:pid").submit(batch(1)).result(timeout=20).scores["pid"][0]
    assert pid != os.getpid() and int(pid) in {child.pid for child in children()}
    assert not any(name.endswith("apart") for name in sys.modules)


def test_output_is_relayed_before_the_result(pools, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def loud(completions):
        print("plain")
        print("to stderr", file=sys.stderr)
        os.write(1, b"to the descriptor\n")
        subprocess.run(["echo", "from a child"], check=True)
        print("é\ud800 no line break", end="")
        return [1.0] * len(completions)

    pool = pools(loud)
    for _ in range(2):
        pool.submit(batch()).result(timeout=20)
        assert sorted(pools.lines) == sorted(
            f"loud: {line}"
            for line in ("plain", "to stderr", "to the descriptor", "from a child", "é\\ud800 no line break")
        )
        pools.lines.clear()


def test_output_goes_to_stdout_by_default(capfd):
    def loud(completions):
        print("hello")
        return [1.0] * len(completions)

    with RewardPool([loud]) as pool:
        pool.submit(batch()).result(timeout=20)
    assert capfd.readouterr().out == "hello\n"


def test_a_flood_of_output_and_large_batches_pass_each_other(pools):
    async def flood(completions, payload, log_extra):
        for _ in range(40):
            print("x" * 10_000)
            await asyncio.sleep(0)
        log_extra("back", payload)
        return [1.0] * len(completions)

    pool = pools(flood)
    payload = ["y" * 3_000_000]
    futures = [pool.submit(batch(1, payload=payload)) for _ in range(4)]
    assert all(future.result(timeout=60).extras == {"back": payload} for future in futures)
    assert pools.lines == ["flood: " + "x" * 10_000] * 160


# Starting


def test_what_cannot_be_loaded_is_refused_at_the_start(tmp_path):
    (tmp_path / "dies.py").write_text("import os\nos._exit(4)\n")
    (tmp_path / "fails.py").write_text("\n1 / 0\n")
    lock = threading.Lock()
    cases = [
        (["corectness"], "did you mean 'correctness'"),
        ([f"{tmp_path}/fails.py:f"], r"failed to load at .*fails.py:2: ZeroDivisionError"),
        ([f"{tmp_path}/dies.py:f"], "'f': its process ended itself with exit code 4 while loading"),
        ([{"function": "length_penalty"}], "'length_penalty': missing a required argument: 'max_completion_length'"),
        ([{"function": "regular_expression", "options": {"pattern": "("}}], "is not a regular expression"),
        ([{"function": "soft_format", "options": {"mutliline": True}}], "no option 'mutliline'; it takes .*multiline"),
        (["correctness", {"function": "integer", "name": "correctness"}], "two rewards are called 'correctness'"),
        ([], "there is no reward function"),
        ([lambda completions: lock], "cannot be sent to its process"),
        (["integer", "numeric_answer"], "'numeric_answer' asks for 'answer', .*there are: solution"),
    ]
    for rewards, sentence in cases:
        with pytest.raises(UserError, match=sentence) as error:
            RewardPool(rewards, example={"solution": "4"})
        assert "\n" not in str(error.value)
    assert not children()


def test_a_column_that_cannot_be_sent_is_named(pools):
    with pytest.raises(UserError, match="column 'lock' cannot be sent to the reward functions"):
        pools("integer").submit(batch(1, lock=[threading.Lock()]))
