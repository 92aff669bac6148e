"""`[log] to`: the metrics of each step sent to TensorBoard, Weights & Biases or trackio as well.

Each is an optional install and starts with the first step. Only the resolved configuration and numbers are sent;
completions and the environment are not. After `--resume` a tracker gets a second run of the same name.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.config import Config
from grpo.errors import UserError

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Trackers:
    """The trackers that `config` asks for. Raises UserError at once for one that is not installed."""

    def __init__(self, config: Config, run_folder: Path):
        self._config, self._folder = config, run_folder
        self._modules = {name: imported(name) for name in config.log.to}
        self._writer: Any = None
        self._started = False

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Send the numbers among `metrics`, whose "step" they belong to."""
        if not self._started:
            self._start()
        step = metrics["step"]
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float) and key != "step"}
        for name, module in self._modules.items():
            if name == "tensorboard":
                for key, value in numbers.items():
                    self._writer.add_scalar(key, value, step)
            else:
                module.log(numbers, step=step)

    def _start(self) -> None:
        self._started = True
        for name, module in self._modules.items():
            if name == "tensorboard":
                self._writer = module.SummaryWriter(str(self._folder / "tensorboard"))
            else:
                module.init(project="grpo", name=self._folder.name, config=self._config.model_dump(mode="json"))

    def close(self) -> None:
        """Flush and end what was started."""
        if not self._started:
            return
        self._started = False
        for name, module in self._modules.items():
            if name == "tensorboard":
                self._writer.close()
            else:
                module.finish()


def imported(name: str) -> Any:
    """The module of tracker `name`."""
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError:
        raise UserError(f'log.to = ["{name}"]: {name} is not installed; pip install {name}, or leave it out') from None
