"""The reward pool: functions in processes of their own, and everything that can go wrong in one.

Reward functions are made inside the tests: a nested function travels by value, so a worker need not import this file.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.rewards.contract import RewardBatch, RewardSpec
from grpo.rewards.pool import RewardPool
from grpo.rewards.runner import how_it_ended, machine_memory

ROOT = Path(__file__).resolve().parent.parent


def batch(size: int = 3, **columns) -> RewardBatch:
    texts = [f"<answer>{index}</answer>" for index in range(size)]
    columns = columns or {"answer": [str(index) for index in range(size)]}
    return RewardBatch(["q"] * size, texts, [[index] for index in range(size)], columns, step=1, max_steps=10)


@pytest.fixture
def pools():
    """Makes pools that are closed after the test; `pools.lines` is what their functions printed."""
    made: list[RewardPool] = []
    lines: list[str] = []

    def make(*rewards, **arguments) -> RewardPool:
        arguments.setdefault("on_output", lambda name, line: lines.append(f"{name}: {line}"))
        made.append(RewardPool(rewards, **arguments))
        return made[-1]

    make.lines = lines
    yield make
    for pool in made:
        pool.close()


def error_of(pool: RewardPool, given: RewardBatch | None = None) -> str:
    with pytest.raises(UserError) as error:
        pool.submit(given or batch()).result(timeout=20)
    assert "\n" not in str(error.value)
    return str(error.value)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def wait_until(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def counting():
    """A function with a counter in its closure, that scores with its number of calls."""
    calls = 0

    def count(completions):
        nonlocal calls
        calls += 1
        return [float(calls)] * len(completions)

    return count


# Scoring


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


# What goes wrong


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

    here = r"test_reward_pool\.py:\d+"
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
    functions["hoards"] = (None, r"ran out of the 0.2 GB of memory that it may use at .*test_reward_pool\.py:\d+$")
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
    assert any(re.search(r'test_reward_pool\.py", line \d+ in hangs', line) for line in pools.lines), pools.lines


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


# Ending


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
from grpo.rewards.contract import RewardBatch
from grpo.rewards.pool import RewardPool

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
