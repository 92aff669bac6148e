"""Compiling a run's kernels while its packages are still being imported, in processes that do nothing else.

A first start on a machine compiles some fifty kernels, a second each; where a step first needs them it waits for one
after another. Which they are follows from the model's sizes, the adapter and the card, all of which are known before
torch is imported. The processes (ahead_worker.py) compile them into Triton's cache on disk, where launches find them;
what a launch does not find yet it compiles itself, so nothing here can be wrong, only useless. A start that has nothing
to compile starts no process: what is done is recorded beside Triton's cache, by the model, the card and all versions.
They end with the run, however it ends (tied.py), and take only cores and memory that are free (room.py).

Not here: which launches (ahead_worker.py), models with layers of different kinds, experts or states, 8-bit weights,
and all weights trained. Nothing imports torch.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from grpo.config.schema import Config
from grpo.memory.plan import Shape, sequence_limits
from grpo.memory.shapes import model_shape
from grpo.model.families.table import family_of
from grpo.model.layout import fused_linears
from grpo.model.locate import local_path
from grpo.model.sizes import linear_shapes
from grpo.run import tied
from grpo.run.room import cores, free_memory

PROCESSES, SECONDS = 12, 90
"""At most, beside a program that starts; after so long they end, whatever they have not done."""
PROCESS_BYTES, SHARE = 1 << 30, 0.5
"""What one may take (half of it is torch and Triton), and the part of the free memory that all may."""
FEWEST_CORES, LEFT_CORES = 4, 2
"""Without so many none is started; so many are left to the run."""
ATTRIBUTES = {"multiprocessors": 16, "l2": 38, "major": 75, "minor": 76, "shared_memory": 97}
"""Of a device, by their numbers in CUDA's driver interface."""
RANK_MULTIPLE = 16
ROTATE_LAST = ("llama", "qwen2", "qwen3")
"""Types of models whose attention in vLLM is one of ROTATE_LAST in grpo/rollout/decoding_attention.py."""
_begun: list[subprocess.Popen[bytes]] = []


def begin(config: Config, own_decoding: Callable[[int], bool]) -> bool:
    """Begin to compile what `config`'s run will launch on its GPU; whether processes are at it. own_decoding: whether
    decoding steps are by the project's kernels throughout on a GPU of such an architecture."""
    if config.model.device == "cpu" or config.rollout.enforce_eager or os.environ.get("TRITON_INTERPRET", "0") != "0":
        return False
    count = processes()
    if count < 1:
        return False
    launches = launches_of(config)
    card = driver_card() if launches is not None else None
    if launches is None or card is None:
        return False
    work = {**launches, "card": card, "own_decoding": own_decoding(card["architecture"])}
    done = record(work)
    if done.exists():
        return False
    claims = tempfile.mkdtemp(prefix="grpo-compile-")
    atexit.register(end, claims)
    try:
        for _ in range(count):
            _begun.append(tied.start("grpo.run.ahead_worker", claims, json.dumps(work), seconds=SECONDS))
    except OSError:  # no further process: those that there are do it
        if not _begun:
            return False
    threading.Thread(target=_wait, args=(done, claims), daemon=True, name="compile").start()
    return True


def begun() -> bool:
    """Whether `begin` started processes in this one."""
    return bool(_begun)


def processes() -> int:
    """How many this machine has room for."""
    free = cores()
    if free < FEWEST_CORES:
        return 0
    return min(PROCESSES, free - LEFT_CORES, int(SHARE * free_memory()) // PROCESS_BYTES)


def end(claims: str) -> None:
    """End the processes that are still at it, and remove the folder `claims` that they share."""
    for process in _begun:
        if process.poll() is None:
            process.kill()
    shutil.rmtree(claims, ignore_errors=True)


def _wait(done: Path, claims: str) -> None:
    """Until all have ended; note it where all did so by themselves: the run compiles what they could not."""
    ends = time.monotonic() + SECONDS
    codes = []
    for process in _begun:
        try:
            codes.append(process.wait(max(0.1, ends - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(1)
    shutil.rmtree(claims, ignore_errors=True)
    if set(codes) <= {tied.DONE, tied.PARTLY}:
        try:
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()
        except OSError:
            return


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture as CUDA graphs: powers of two to 16, then steps of 16, and the largest itself."""
    sizes = [size for size in (1, 2, 4, 8, *range(16, max_num_seqs + 1, 16)) if size <= max_num_seqs]
    return sorted({*sizes, max_num_seqs})


def launches_of(config: Config) -> dict[str, Any] | None:
    """What ahead_worker.py has to know of the run besides the card; None where it knows no such model."""
    model, lora = config.model, config.lora
    if model.load_in_8bit or model.full_finetuning or config.train.kernels == "torch":
        return None
    shape = model_shape(model)
    if not isinstance(shape, Shape) or shape.num_experts or shape.quantization_config:
        return None
    family, sizes = family_of(shape.model_type), linear_shapes(shape)
    if not family.fused_layers:
        return None
    targets = lora.target_modules
    linears = {}
    for name, parts in fused_linears(shape).items():
        if ".layers.0." in name:
            chosen = [isinstance(targets, str) or part.rpartition(".")[2] in targets for part in parts]
            rows = [sizes[part][0] for part in parts]
            ranks = -(-lora.r * sum(chosen) // RANK_MULTIPLE) * RANK_MULTIPLE
            linears[name.rpartition(".")[2]] = {"rows": rows, "columns": sizes[parts[0]][1], "ranks": ranks}
    values = config_values(model.name)
    return {
        "linears": linears, "r": lora.r, "hidden": shape.hidden_size, "heads": shape.num_attention_heads,
        "key_value_heads": shape.num_key_value_heads, "head": shape.head_dim, "vocabulary": shape.vocab_size,
        "bias": bool(values.get("attention_bias", shape.model_type == "qwen2")),
        "activation": values.get("hidden_activation") or values.get("hidden_act") or "silu",
        "unit_offset": family.norm_adds_one, "head_norms": shape.model_type in ("qwen3", "gemma3_text"),
        "softcap": values.get("final_logit_softcapping"), "packed": model.load_in_4bit, "dtype": model.dtype,
        "longest": sequence_limits(config)[0], "rotates_last": shape.model_type in ROTATE_LAST,
        "rows": capture_sizes(sequence_limits(config)[1])[::-1], "tokens": config.train.tokens_per_micro_batch,
        "temperature": config.rollout.temperature,
    }  # fmt: skip


def config_values(name: str) -> dict[str, Any]:
    """The entries of a model's config.json on this machine; none without one."""
    path = local_path(name)
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return values.get("text_config") or values


def driver_card() -> dict[str, Any] | None:
    """The first GPU that this process may use as kernels/cards.py has it, asked of CUDA's driver, without a context on
    it; None without one, and where torch is a build for CPUs."""
    try:
        if metadata.version("torch").endswith("+cpu"):
            return None
    except metadata.PackageNotFoundError:
        return None
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name, value = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetName(name, 256, device):
        return None
    found = {}
    for attribute, number in ATTRIBUTES.items():
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device):
            return None
        found[attribute] = value.value
    architecture = 10 * found.pop("major") + found.pop("minor")
    return {"name": name.value.decode(), "architecture": architecture, **found}


def record(work: dict[str, Any]) -> Path:
    """The file that says that `work` is in Triton's cache, and goes when it goes."""
    digest = hashlib.sha256(json.dumps(work, sort_keys=True).encode())
    root = Path(__file__).resolve().parents[2]
    sources = (root / "kernels") if (root / "kernels").is_dir() else root / "grpo" / "kernels"
    for file in sorted(sources.glob("*.py")):
        digest.update(file.read_bytes())
    for package in ("torch", "triton"):
        try:
            digest.update(metadata.version(package).encode())
        except metadata.PackageNotFoundError:
            continue
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    return Path(folder) / f"grpo-ahead-{digest.hexdigest()[:16]}"
