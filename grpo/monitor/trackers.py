"""`[log] to`: the metrics of each step sent to TensorBoard, Weights & Biases or trackio as well.

Each is an optional install and starts with the first step. Sent are numbers and the resolved configuration, without
the text under keys such as `api_key`: no completions, no code, nothing of the environment or the machine. Where it goes
is set with the tracker's own variables (`WANDB_MODE=offline`, `TRACKIO_SPACE_ID`, ...); TensorBoard writes to the run
folder. After `--resume` a tracker gets a second run of the same name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from grpo.config.schema import Config
from grpo.errors import UserError
from grpo.run.records import without_secrets

PROJECT = "grpo"


class Tracker(Protocol):
    """One that has started."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class Trackers:
    """The trackers that `config` asks for. Raises UserError at once for one that is not installed or not logged in."""

    def __init__(self, config: Config, run_folder: Path):
        self._config, self._folder = config, run_folder
        self._modules = {name: imported(name) for name in config.log.to}
        if "wandb" in self._modules:
            log_in(self._modules["wandb"])
        self._started: list[Tracker] | None = None

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Send the numbers among `metrics`, whose "step" they belong to. Raises UserError for one that cannot start."""
        if self._started is None:
            self._started = [self._start(name, module) for name, module in self._modules.items()]
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float) and key != "step"}
        for tracker in self._started:
            tracker.log(numbers, step=metrics["step"])

    def _start(self, name: str, module: Any) -> Tracker:
        start: Callable[..., Tracker] = {"tensorboard": TensorBoard, "wandb": start_wandb, "trackio": start_trackio}[
            name
        ]
        try:
            return start(module, self._folder, without_secrets(self._config.model_dump(mode="json")))
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise UserError(
                f'log.to = ["{name}"]: {name} does not start ({first}); mend that, or leave it out'
            ) from error

    def close(self) -> None:
        """Flush and end what was started."""
        for tracker in self._started or ():
            tracker.finish()
        self._started = None


class TensorBoard:
    """Event files in the run folder's `tensorboard/`. The configuration is not repeated there."""

    def __init__(self, module: Any, run_folder: Path, config: dict[str, Any]):
        self._writer = module.SummaryWriter(str(run_folder / "tensorboard"))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        # A reader beside the run sees each step as it is done.
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def log_in(module: Any) -> None:
    """Find the key for Weights & Biases now rather than after the model is loaded; nothing in its offline mode."""
    try:
        module.login()
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f'log.to = ["wandb"]: {first} Run `wandb login`, set WANDB_MODE=offline, or leave it out'
        ) from None


def start_wandb(module: Any, run_folder: Path, config: dict[str, Any]) -> Tracker:
    """A run whose own files are in the run folder's `wandb/`, and which looks at nothing but what it is sent."""
    quiet = module.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        silent=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    return module.init(project=PROJECT, name=run_folder.name, dir=str(run_folder), config=config, settings=quiet)


def start_trackio(module: Any, run_folder: Path, config: dict[str, Any]) -> Tracker:
    """A run that logs nothing of the machine and opens no dashboard in a notebook."""
    options = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
    return module.init(project=PROJECT, name=run_folder.name, config=config, **options)


def imported(name: str) -> Any:
    """The module of tracker `name`."""
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'log.to = ["{name}"]: {name} is not installed; pip install {name}, or leave it out') from None
