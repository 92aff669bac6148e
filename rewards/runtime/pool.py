"""`RewardPool`: scores batches of completions with several reward functions, each in a process of its own.

`submit` returns a future at once, so scoring overlaps generation. A function sees batches in the order they were
submitted; coroutine functions work on several batches at once. A call that raises, hangs, dies, exhausts its memory
or returns nonsense ends as a UserError in the future or as missing scores, by the reward's `on_error`; it never
blocks the pool, and a hanging or dead process is replaced (its module's state starts afresh).

Weights, sums and advantages are the trainer's.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import accumulate
from types import ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from grpo.errors import UserError
from grpo.references import described
from grpo.rewards.runtime.carried import dumps
from grpo.rewards.runtime.contract import RewardBatch, RewardResult, RewardSpec, mean
from grpo.rewards.runtime.runner import Outcome, Runner


class RewardPool:
    """Reward functions ready to score.

    Args:
        rewards: `config.Reward`s, RewardSpecs, `[[rewards]]` tables, names or callables. A callable travels by value
            (cloudpickle), so closures and notebook functions work; one of an importable module, by its name.
        example: one row's columns. When given, a function that asks for a column which is not there is refused now
            and not at its first call.
        on_output: called with a reward's name and a line that its function printed, from another thread; by default
            lines go to `sys.stdout`.

    Returns when all functions are loaded. Raises UserError if one cannot be, or if two have the same name; then no
    process is left. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        rewards: Sequence[Any],
        *,
        example: Mapping[str, Any] | None = None,
        on_output: Callable[[str, str], None] | None = None,
    ) -> None:
        self.specs = [RewardSpec.of(reward) for reward in rewards]
        names = [spec.column for spec in self.specs]
        if not names:
            raise UserError("there is no reward function; add a [[rewards]] table")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two rewards are called {name!r}; give one of them a different name")
        functions = [pickle_function(spec, example) for spec in self.specs]
        self._relay = functools.partial(relay_line, on_output or print_line, threading.Lock())
        self._order = threading.Lock()  # every function sees batches in one order, whoever submits
        self._closed = False
        self._runners: list[Runner] = []
        self._finalizer = weakref.finalize(self, stop_all, self._runners)
        for spec, function in zip(self.specs, functions, strict=True):
            limit = None if spec.memory_limit_gb is None else int(spec.memory_limit_gb * 1e9)
            relay = functools.partial(self._relay, spec.column)
            self._runners.append(Runner(spec.column, function, spec.timeout, limit, relay))
        try:
            for runner in self._runners:
                runner.started.result()
        except BaseException:
            self.close()
            raise

    def submit(self, batch: RewardBatch) -> Future[RewardResult]:
        """Have all functions score `batch`; returns at once.

        The future holds a RewardResult, or a UserError naming the function and the cause as soon as one fails whose
        `on_error` is "stop". It cannot be cancelled. Raises UserError when a column's values cannot be sent to
        another process, and RuntimeError after `close`.
        """
        pending = PendingBatch(self.specs, len(batch), self._relay)
        payload = pickle_batch(batch)
        with self._order:
            if self._closed:
                raise RuntimeError("the reward pool is closed")
            if not len(batch):
                pending.future.set_result(RewardResult({spec.column: [] for spec in self.specs}, {}, {}, {}))
                return pending.future
            for index, runner in enumerate(self._runners):
                runner.put(payload, functools.partial(pending.take, index))
        return pending.future

    def close(self) -> None:
        """End all processes and threads. Batches still being scored fail. May be called twice."""
        with self._order:
            self._closed = True
        self._finalizer()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PendingBatch:
    """Gathers the functions' outcomes for one batch, and resolves its future."""

    def __init__(self, specs: Sequence[RewardSpec], size: int, relay: Callable[[str, str], None]) -> None:
        self.future: Future[RewardResult] = Future()
        self.future.set_running_or_notify_cancel()
        self._specs = specs
        self._size = size
        self._relay = relay
        self._failed = False
        self._outcomes: list[Outcome | None] = [None] * len(specs)
        self._lock = threading.Lock()

    def take(self, index: int, outcome: Outcome) -> None:
        """Note how function `index` ended; called once for each, from its runner's thread."""
        spec = self._specs[index]
        stops = bool(outcome.error) and spec.on_error == "stop"
        with self._lock:
            self._outcomes[index] = outcome
            if self._failed:
                return
            self._failed = stops
            complete = all(self._outcomes)
        # The future's callbacks run here, so no lock is held.
        if stops:
            for line in outcome.traceback.splitlines():
                self._relay(spec.column, line)
            self.future.set_exception(UserError("; ".join(filter(None, [outcome.error, outcome.remedy]))))
            return
        if outcome.error:
            self._relay(spec.column, f"skipped {self._size} completions: {outcome.error}")
        if complete:
            self.future.set_result(self._result())

    def _result(self) -> RewardResult:
        result = RewardResult({}, {}, {}, {})
        logged: dict[str, list[float]] = {}
        for spec, outcome in zip(self._specs, self._outcomes, strict=True):
            assert outcome is not None
            name = spec.column
            result.seconds[name] = outcome.seconds
            if spec.on_error == "skip":
                result.metrics[f"rewards/{name}/errors"] = float(outcome.scores is None)
            if outcome.scores is None:
                result.scores[name] = [None] * self._size
                continue
            result.scores[name] = outcome.scores.values
            result.extras |= outcome.scores.extras
            for metric, values in outcome.scores.metrics.items():
                logged.setdefault(metric, []).extend(values)
        result.metrics |= {metric: mean(values) for metric, values in logged.items()}
        return result


def relay_line(on_output: Callable[[str, str], None], lock: threading.Lock, name: str, line: str) -> None:
    with lock:
        on_output(name, line)


def print_line(name: str, line: str) -> None:
    """Show what a reward function printed as if it had run here."""
    print(line, flush=True)


def stop_all(runners: Iterable[Runner]) -> None:
    """End the runners, all at the same time."""
    runners = list(runners)
    for runner in runners:
        runner.stop()
    for runner in runners:
        runner.join()


def pickle_function(spec: RewardSpec, example: Mapping[str, Any] | None) -> bytes:
    """The reference or callable of `spec`, its options and `example`, for its process. Raises UserError if it cannot
    be sent.
    """
    content = (spec.function, dict(spec.options), None if example is None else dict(example))
    try:
        with by_value(home(spec.function)):
            return dumps(content)
    except Exception as error:
        raise UserError(
            f"reward {spec.column!r} cannot be sent to its process ({described(error)}); put it into a file that "
            'makes what it needs, and name it as "path/file.py:function"'
        ) from error


def pickle_batch(batch: RewardBatch) -> bytes:
    """`batch` for the processes. Raises UserError naming the column that cannot be sent."""
    try:
        return pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)
    except Exception:
        for column, values in batch.columns.items():
            try:
                pickle.dumps(values)
            except Exception as error:
                raise UserError(
                    f"column {column!r} cannot be sent to the reward functions ({described(error)}); keep to numbers, "
                    "strings, lists and dicts"
                ) from error
        raise


def home(function: Any) -> ModuleType | None:
    """The module that defines a callable, or the class of one."""
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None) or type(function).__module__
    return sys.modules.get(module)


@contextlib.contextmanager
def by_value(module: ModuleType | None) -> Iterator[None]:
    """Within, cloudpickle takes a module that another process could not import by value."""
    if module is None or module.__name__ == "__main__" or is_importable(module):
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def is_importable(module: ModuleType) -> bool:
    """Whether importing the module's name afresh would find the same file."""
    path: Any = None
    spec = None
    for name in accumulate(module.__name__.split("."), "{}.{}".format):
        finders = (finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((found for found in finders if found is not None), None)
        if spec is None:
            return False
        path = getattr(sys.modules.get(name), "__path__", spec.submodule_search_locations)
    file = getattr(module, "__file__", None)  # None: part of the interpreter
    return file is None or (spec is not None and spec.origin == file)
