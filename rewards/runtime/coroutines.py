"""How a worker serves a coroutine function: one event loop, in which several batches are scored at once."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import asdict

from grpo.rewards.runtime.conventions import RewardFunction
from grpo.rewards.runtime.protocol import Setup, encode, failure, receive, reply, unpack


def run(link: socket.socket, function: RewardFunction, setup: Setup) -> None:
    """Serve `function` until the link closes."""
    asyncio.run(serve_async(link, function, setup))


async def serve_async(link: socket.socket, function: RewardFunction, setup: Setup) -> None:
    """Score batches concurrently: each starts when it arrives."""
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()
    calls: set[asyncio.Task[None]] = set()

    async def score(message: bytes) -> None:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(setup.timeout) as limit:
                answer = encode(asdict(await function.score_async(unpack(message))), message, start)
        except BaseException as error:
            if closed.is_set():
                raise
            report = {"overdue": True} if limit.expired() else failure(error, function, setup)
            answer = encode(report, message, start)
        reply(link, answer)

    def on_message() -> None:
        message = receive(link)
        if message is None:
            loop.remove_reader(link)
            closed.set()
            return
        task = loop.create_task(score(message))
        calls.add(task)
        task.add_done_callback(calls.discard)

    loop.add_reader(link, on_message)
    await closed.wait()
