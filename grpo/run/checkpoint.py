"""The run folder and the checkpoints in it: whole or absent, never half-written, and free of pickle.

A checkpoint is written beside its final place, flushed to the disk, described in a manifest with the SHA-256 of every
file, and renamed. `latest` takes the newest whose manifest holds. For what a checkpoint contains see the trainer;
this file has the rules for the folder, and a lock against a second process.

    runs/NAME/
      .lock               held while a process writes here
      config.toml         the resolved configuration
      base_sample.json    by which the base is known again, and the layers that keep_16bit = "auto" chose
      checkpoints/step-N/ manifest.json and the trainer's files
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from grpo.config.messages import shown
from grpo.config.schema import Config, Model, config_toml, read_config
from grpo.config.toml import NONE, write_value
from grpo.errors import UserError
from grpo.model.locate import BASE_SAMPLE, INITIAL_ADAPTER, local_path
from grpo.run.records import COMPLETIONS, EVALUATIONS, REPORT

MANIFEST = "manifest.json"
CONFIG = "config.toml"
LOCK = ".lock"
REFERENCE = "reference_adapter"
BEFORE_FIRST_STEP = {
    LOCK, CONFIG, BASE_SAMPLE, INITIAL_ADAPTER, REFERENCE, EVALUATIONS, "best_adapter", "best_model", COMPLETIONS,
    "tensorboard", "wandb", REPORT,
}  # fmt: skip
STEP = re.compile(r"step-(\d+)")

# What a resumed run must have in common with the one that it continues: how the base is held and the shape of the
# adapter, which the saved tensors belong to, and what the position in the data and the optimiser's state refer to.
FIXED = (
    "model.revision",
    "model.load_in_4bit",
    "model.load_in_8bit",
    "model.full_finetuning",
    "model.dtype",
    "model.keep_16bit",
    "lora.r",
    "lora.lora_alpha",
    "lora.use_rslora",
    "lora.target_modules",
    "lora.exclude_modules",
    "lora.layers_to_transform",
    "lora.layers_pattern",
    "lora.rank_pattern",
    "lora.alpha_pattern",
    "lora.init_lora_weights",
    "lora.loftq_iter",
    "task",
    "rollout.max_prompt_length",
    "train.seed",
    "train.optim",
    "train.weight_update",
    "environment.schedule",
    "environment.latency_steps",
    "environment.join_steps",
)

logger = logging.getLogger("grpo")


class RunFolder:
    """A run folder held for writing; `path` is the folder. Another process is refused until `close`."""

    def __init__(self, path: Path, lock: int):
        self.path = path
        self._lock: int | None = lock

    def close(self) -> None:
        """Give the folder free. One in which no step was logged and no checkpoint written is removed again."""
        if self._lock is None:
            return
        if _is_unused(self.path):
            with contextlib.suppress(OSError):
                _clear(self.path)
                (self.path / LOCK).unlink()
                self.path.rmdir()
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_run(config: Config, *, resume: bool = False) -> RunFolder:
    """Take the run folder that `config` names, and write the resolved configuration into a new one.

    One that is resumed keeps its configuration until the run goes on (`RunLog.resume`): what is refused before, such as
    other data, leaves a folder that can still be resumed as it was. Raises UserError as `check_run` and
    `create_run_folder` do.
    """
    check_run(config, resume=resume)
    run = create_run_folder(config.checkpoint.output_dir, resume)
    if resume:
        return run
    try:
        write_atomically(run.path / CONFIG, config_toml(config).encode())
    except OSError as error:
        run.close()
        raise UserError(f"{run.path}: cannot be written ({error.strerror}); name another with --output") from None
    return run


def check_run(config: Config, *, resume: bool) -> None:
    """Raise UserError where the run folder that `config` names is not free or, with `resume`, not to be continued.

    Nothing is written or locked: it is for saying so before torch and vLLM are loaded. Only a base that has moved is
    looked into.
    """
    path = config.checkpoint.output_dir
    _check_folder(path, resume)
    if resume:
        saved = saved_config(path)
        check_resumable(saved, config)
        check_base_of_run(path, saved.model, config.model)


def create_run_folder(path: Path, resume: bool) -> RunFolder:
    """Take the folder `path` for this process alone, creating it unless `resume`.

    A folder that holds nothing, or only what a run leaves that ended before its first step, counts as new.
    Raises UserError where the folder exists and `resume` is false, where there is nothing to resume, where another
    process holds it, and where it cannot be written.
    """
    _check_folder(path, resume)
    try:
        path.mkdir(parents=True, exist_ok=True)
        run = RunFolder(path, _lock(path))
        try:
            # Again, now that no other process can have changed it since.
            _check_folder(path, resume)
            if not resume:
                _clear(path)
        except BaseException:
            run.close()
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another folder with --output") from None
    return run


def _check_folder(path: Path, resume: bool) -> None:
    if resume and not (path / CONFIG).is_file():
        raise UserError(f"{path}: there is no run to resume here (no {CONFIG}); start it without --resume")
    try:
        free = not os.path.lexists(path) or (path.is_dir() and _is_unused(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name another folder with --output") from None
    if not resume and not free:
        raise UserError(f"{path} already exists; continue that run with --resume, or name another folder with --output")


def saved_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that the run in folder `path` was started or last resumed with, with `--set` overrides.

    Raises UserError where there is no run.
    """
    _check_folder(path, resume=True)
    return read_config(path / CONFIG, overrides)


def run_is_begun(path: Path) -> bool:
    """Whether the folder is of a run that there is something to continue of."""
    return (path / CONFIG).is_file() and not _is_unused(path)


def _is_unused(path: Path) -> bool:
    """Whether the folder is empty, or a run's that ended before its first step (the lock tells that it is a run's)."""
    names = {entry.name for entry in path.iterdir()}
    return not names or (LOCK in names and names <= BEFORE_FIRST_STEP)


def _clear(path: Path) -> None:
    """Remove what a run leaves that ended before its first step, the lock excepted."""
    for name in BEFORE_FIRST_STEP - {LOCK}:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)


def _lock(path: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed, which the system does for a process that dies."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise UserError(
            f"{path}: another process ({holder or 'starting'}) is writing to this run folder; wait for it, or name "
            "another folder with --output"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def check_resumable(saved: Config, new: Config) -> None:
    """Raise UserError naming the first key in which `new` cannot continue the run that `saved` describes.

    Whatever is not in `FIXED` may change: the number of steps, the learning rate, the loss, logging, checkpoints, and
    where the base is, which `check_base_of_run` looks at.
    """
    for key in FIXED:
        if key == "model.revision" and saved.model.name != new.model.name:
            continue  # it is that of the name
        before, now = _at(saved, key), _at(new, key)
        if before != now:
            raise UserError(
                f"--resume: {key} = {now} does not fit the run in {new.checkpoint.output_dir}, which has {before}; set "
                "it back, or start a new run with another --output"
            )


def moved_base(base: str, *, resume: bool) -> list[str]:
    """What `--base` overrides in a configuration. Raises UserError for a path that does not exist, and a new run."""
    if not resume:
        raise UserError(f"--base {base}: a new run's base is model.name; --base goes with --resume")
    try:
        local_path(base)
    except UserError:
        raise UserError(f"--base {base}: no such file or folder; name where the run's base is now") from None
    return [f"model.name={write_value(base)}", f"model.revision={write_value(NONE)}"]


def check_base_of_run(run: Path, saved: Model, now: Model) -> None:
    """Raise UserError unless `now`, of a configuration, means the base that the run in folder `run` began with.

    `saved` is what the run says. Under another name the very weights have to be there; they are known by the sample
    that the run keeps.
    """
    if now.name == saved.name:
        try:
            local_path(now.name)
        except UserError as error:
            raise UserError(f"{run}: the base of this run has moved ({error}); say where it is with --base") from None
        return
    from grpo.model import fingerprint
    from grpo.model.source import open_source

    steps = [run / "checkpoints" / f"step-{step}" / "adapter" for step in reversed(step_numbers(run))]
    known = next((found for folder in (run, *steps) if (found := fingerprint.read(folder)) is not None), None)
    if known is None:
        raise UserError(
            f"--resume: model.name = {shown(now.name)} does not fit the run in {run}, which has {shown(saved.name)} "
            "and no sample of it to know it again by; set it back, or start a new run with another --output"
        )
    found = fingerprint.Fingerprint.of(open_source(now))
    if known.distance(found) <= fingerprint.SAME_WEIGHTS:
        return
    message = f"weights sampled from both are {known.distance(found):.1%} apart"
    if known.admits(found):
        message = f"it is the same model stored otherwise, {found.stored_as} and not {known.stored_as}: {message}"
    raise UserError(
        f"--resume: {now.name} is not the base of the run in {run} ({message}); name what {saved.name} was, or start a "
        "new run with another --output"
    )


def _at(config: Config, key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)  # a whole section may be absent
    if key == "task":
        value = [task.model_dump(exclude_defaults=True, mode="json") for task in value]
    return shown(NONE if value is None else value)


def save(run: Path, step: int, write: Callable[[Path], None], keep: int | None) -> Path:
    """Write checkpoint `step` of the run in folder `run` and return its folder.

    `write` is called with an empty folder and puts the files there. Older checkpoints beyond the newest `keep` are
    removed once the new one is safe (None: none are), and so are later ones: the run has gone back behind them.
    Raises UserError where the disk refuses; the checkpoints before it are untouched then.
    """
    parent = run / "checkpoints"
    final, partial = parent / f"step-{step}", parent / f".partial-{step}"
    try:
        parent.mkdir(exist_ok=True)
        for leftover in parent.glob(".*-*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        write(partial)
        manifest = {"step": step, "files": {name: _sha256(partial / name) for name in _files(partial)}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if final.exists():
            final.rename(parent / f".replaced-{step}")
        partial.rename(final)
        _flush(parent)
        _prune(run, step, keep)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{final}: the checkpoint could not be written ({error}); the ones before it are whole, make room and "
            "continue with --resume"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _prune(run: Path, step: int, keep: int | None) -> None:
    steps = step_numbers(run)
    before = [each for each in steps if each < step]
    surplus = [] if keep is None else before[: max(len(before) - keep + 1, 0)]
    parent = run / "checkpoints"
    for each in (*surplus, *(later for later in steps if later > step)):
        # Renamed first, so that a folder called step-N is never half-removed.
        (parent / f"step-{each}").rename(parent / f".removed-{each}")
    for leftover in parent.glob(".*-*"):
        shutil.rmtree(leftover)


def step_numbers(run: Path) -> list[int]:
    """The steps of which `run` has a checkpoint folder, in order; none of them verified."""
    folder = run / "checkpoints"
    matches = (STEP.fullmatch(entry.name) for entry in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in matches if match)


def latest(run: Path, notice: Callable[[str], None] = logger.warning) -> Path | None:
    """The newest checkpoint whose files are all as they were written, or None.

    `notice` is given a sentence for each newer one that is passed over.
    """
    for step in reversed(step_numbers(run)):
        folder = run / "checkpoints" / f"step-{step}"
        problem = _problem(folder)
        if problem is None:
            return folder
        notice(f"{folder} is passed over: {problem}; the checkpoint before it is used")
    return None


def _problem(folder: Path) -> str | None:
    """Why the checkpoint in `folder` is not whole; None if it is."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, digest in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST} names a file elsewhere, {name}"
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != digest:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, finds the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _flush(path.parent)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill an empty folder and put it at `path`, in place of one that is there.

    A reader, or a crash, finds the old folder, the new one or, for an instant between two renames, none; never a part.
    Raises OSError where the disk refuses; the old folder stays then.
    """
    partial, replaced = path.with_name(f".partial-{path.name}"), path.with_name(f".replaced-{path.name}")
    try:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        write(partial)
        for written in (*partial.rglob("*"), partial):
            _flush(written)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        _flush(path.parent)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from None
    finally:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
