"""Two nodes on this machine: network namespaces with one link between them, in which torchrun's agents run.

A process of one node reaches the other over the link alone, whose rate can be limited. It takes root and iproute2.
Delay and loss would need the kernel's netem, which many small kernels are built without; a rate needs only tbf.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT

ADDRESSES = ("10.231.7.1", "10.231.7.2")
LINK = "link0"


@dataclass
class Agent:
    """torchrun on one node, and all that it started."""

    process: subprocess.Popen[str]
    output: Path

    def kill(self) -> None:
        """As a machine that loses power: nothing of it says goodbye."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def kill_rank(self) -> None:
        """One of the processes that it started, which it outlives."""
        os.kill(descendants(self.process.pid)[0], signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        return self.process.wait(timeout)

    @property
    def text(self) -> str:
        return self.output.read_text()


@dataclass
class Nodes:
    names: tuple[str, str]
    home: Path
    started: list[Agent]

    def torchrun(
        self, node: int, *arguments: str | Path, ranks: int = 1, restarts: int = 0, share_store: bool = False
    ) -> Agent:
        """`torchrun ... -m grpo.train arguments` on `node`, 0 or 1, in a folder of its own; they meet on node 0."""
        command = [
            "ip", "netns", "exec", self.names[node], sys.executable, "-m", "torch.distributed.run",
            "--nnodes", "2", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--monitor-interval", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--rdzv-id", "nodes",
            "--local-addr", ADDRESSES[node], "--rdzv-conf", f"is_host={int(node == 0)}",
            "-m", "grpo.train", *map(str, arguments),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": LINK}
        if not share_store:
            # Else torch's agents say only once, in the first round, where rank 0 is: a new one would wait in vain.
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        machine = self.machine(node)
        machine.mkdir(exist_ok=True)
        output = self.home / f"agent-{node}-{len(self.started)}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                command, cwd=machine, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True
            )
        self.started.append(Agent(process, output))
        return self.started[-1]

    def machine(self, node: int) -> Path:
        """Where its processes run."""
        return self.home / f"machine-{node}"

    def limit(self, bits_per_second: int | None) -> None:
        """The rate of the link in each direction; None: as fast as it goes."""
        for name in self.names:
            tc = ["tc", "-n", name, "qdisc"]
            subprocess.run([*tc, "del", "dev", LINK, "root"], capture_output=True)
            if bits_per_second:
                rate = ["tbf", "rate", f"{bits_per_second}bit", "burst", "16kb", "latency", "500ms"]
                subprocess.run([*tc, "add", "dev", LINK, "root", *rate], check=True, capture_output=True)


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, the deepest last."""
    with contextlib.suppress(FileNotFoundError):
        children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        return children + [below for child in children for below in descendants(child)]
    return []


@contextlib.contextmanager
def two_nodes(home: Path) -> Iterator[Nodes | None]:
    """The nodes, or None where namespaces cannot be made here."""
    mark = uuid.uuid4().hex[:6]
    names = (f"node0-{mark}", f"node1-{mark}")
    if os.getuid() != 0 or not shutil.which("ip") or not made(names, mark):
        yield None
        return
    nodes = Nodes(names, home, [])
    try:
        yield nodes
    finally:
        for agent in nodes.started:
            agent.kill()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def made(names: tuple[str, str], mark: str) -> bool:
    """Whether the namespaces and their link are there now."""
    ends = (f"a{mark}", f"b{mark}")
    lines = [f"ip netns add {name}" for name in names]
    lines += [f"ip link add {ends[0]} type veth peer name {ends[1]}"]
    for name, end, address in zip(names, ends, ADDRESSES, strict=True):
        lines += [f"ip link set {end} netns {name} name {LINK}", f"ip -n {name} addr add {address}/24 dev {LINK}"]
        lines += [f"ip -n {name} link set {LINK} up", f"ip -n {name} link set lo up"]
    return all(subprocess.run(line.split(), capture_output=True).returncode == 0 for line in lines)
