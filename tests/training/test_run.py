"""grpo/training/run.py and trainer.py: making a trainer is cheap, whatever its session still has to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from grpo.config.schema import parse_config
from grpo.data import load_data
from grpo.monitor.log import NullLog
from grpo.session import open_session
from grpo.training.trainer import Parts, Trainer
from tests.helpers.tiny_run import run_tables, save_rewards, save_tiny_chat_model


class Untouched:
    """In the place of vLLM: it may be closed, and that is all."""

    def close(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"engine.{name} is used")


def test_making_a_trainer_samples_computes_and_writes_nothing(tmp_path: Path) -> None:
    save_tiny_chat_model(tmp_path / "model")
    save_rewards(tmp_path)
    config = parse_config(run_tables(tmp_path))
    run = tmp_path / "new"
    with open_session(config, start_engine=False) as session:
        session._engine = Untouched()  # type: ignore[assignment]
        data = load_data(config, session.tokenizer)
        before = [parameter.detach().clone() for parameter in session.policy.parameters()]
        random = torch.random.get_rng_state()
        trainer = Trainer(Parts(run, NullLog(0, config), session, data), data.train[:3])
        assert trainer.step == 0 and [row for rows in trainer.stream.rows.values() for row in rows] == data.train[:3]
        assert all(map(torch.equal, before, session.policy.parameters())) and not run.exists()
        assert torch.equal(random, torch.random.get_rng_state())
        assert not any(parameter.grad is not None for parameter in session.policy.parameters())
