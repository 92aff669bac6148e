"""Signals: noted while something could be torn apart, raised where nothing is half done, obeyed at once if repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from grpo.run.signals import SIGNALS, Interrupted, Interrupts, leaving_at_once
from tests.helpers.paths import ROOT


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # the interpreter runs handlers between instructions


@pytest.mark.parametrize("number", SIGNALS)
def test_a_deferred_signal_is_raised_at_the_next_check(number: int) -> None:
    with Interrupts() as interrupts, interrupts.deferred():
        interrupts.check()
        send(number)
        with pytest.raises(Interrupted) as caught:
            interrupts.check()
    assert caught.value.number == number and isinstance(caught.value, KeyboardInterrupt)


def test_a_signal_that_is_not_deferred_is_raised_at_once() -> None:
    with Interrupts(), pytest.raises(Interrupted):
        send(signal.SIGTERM)


def test_a_second_signal_is_raised_at_once() -> None:
    with Interrupts() as interrupts, interrupts.deferred():
        send(signal.SIGINT)
        with pytest.raises(Interrupted):
            send(signal.SIGINT)


def test_the_handlers_before_are_there_again_whatever_happens() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError), Interrupts(), Interrupts(), leaving_at_once():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise ValueError
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_one_inside_another_gives_the_signal_to_the_inner_one() -> None:
    with Interrupts() as outer:
        with Interrupts() as inner, inner.deferred():
            send(signal.SIGINT)
            assert (outer.number, inner.number) == (None, signal.SIGINT)
        with pytest.raises(Interrupted):
            send(signal.SIGINT)


def test_another_thread_is_left_alone() -> None:
    def work() -> None:
        with Interrupts() as interrupts, interrupts.deferred(), leaving_at_once():
            done.append(signal.getsignal(signal.SIGINT))

    done: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]


STUCK = """
import ctypes, sys
from grpo.run.signals import Interrupts, leaving_at_once
with leaving_at_once(float(sys.argv[1])), Interrupts() as interrupts, interrupts.deferred():
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).sleep(100)
"""


@pytest.mark.parametrize(
    ("grace", "signals", "code"),
    [
        (60.0, [signal.SIGINT, signal.SIGINT], 130),
        (60.0, [signal.SIGINT, signal.SIGTERM], 143),
        (0.3, [signal.SIGTERM], 143),
    ],
    ids=["twice", "one of each", "grace"],
)
def test_a_process_that_is_stuck_in_c_leaves(grace: float, signals: list[int], code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(grace)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    _, printed = process.communicate(timeout=10)
    assert process.returncode == code
    assert printed.count("saving, then leaving; once more to leave at once") == 1
