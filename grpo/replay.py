"""Compute a dumped update again and say where the first non-finite value appears: `python -m grpo.replay DUMP`.

DUMP is a folder `nonfinite/step-N` of a run. The model is loaded from where the run had it (`--set model.name=...` if
it has moved), with the adapter of the dump; vLLM is not started and nothing is written.

For the exit codes see `grpo.command`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.command import command
from grpo.config.schema import read_config
from grpo.errors import UserError
from grpo.printable import printable
from grpo.run.library_logs import quiet_libraries
from grpo.run.tensor_state import load_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.training.learner import Learner
    from grpo.training.update_check import Batch


@dataclass(frozen=True)
class Replay:
    """What came of computing an update again."""

    problem: str
    """Why the run left it out."""
    recorded: dict[str, float | None]
    figures: dict[str, float | None]
    """The same figures as computed now."""
    first: str | None
    """Where the first non-finite value is, in words; None where all are finite."""


def replay(dump: Path, overrides: Sequence[str] = ()) -> Replay:
    """Compute the update in the folder `dump` again, with `section.key=value` overrides of its configuration.

    Raises UserError for a folder that is not a dump, and for a model that cannot be loaded.
    """
    problem, recorded, batch = read_dump(dump)
    config = read_config(dump / "config.toml", overrides)
    from grpo.policy.rng import RandomState
    from grpo.session import open_session
    from grpo.training.learner import Learner

    adapter = None if config.model.full_finetuning else dump / "adapter"
    with open_session(config, adapter=adapter, start_engine=False) as session:
        if adapter is None:
            session.policy.load(dump / session.policy.artefact)
        learner = Learner(session.policy, config, max_steps=1, notice=print)
        trace = Trace()
        trace.inputs(batch, learner)
        if scale := recorded.get("loss_scale"):
            learner.scaler.scale = scale
        RandomState(session.base.device, batch.rng).restore()
        with trace.watching(learner):
            figures = compute(learner, batch)
    return Replay(problem, recorded, figures, trace.first)


class Recorded(NamedTuple):
    """What a dump holds beside the adapter and the configuration."""

    problem: str
    figures: dict[str, float | None]
    batch: Batch


def read_dump(dump: Path) -> Recorded:
    """The report and the batch in `dump`. Raises UserError for another folder."""
    from grpo.training.dump import BATCH, REPORT, decoded

    try:
        report = json.loads((dump / REPORT).read_bytes())
        figures = {name: None if value is None else float(value) for name, value in report["figures"].items()}
        return Recorded(str(report["problem"]), figures, decoded(load_tensors(dump / BATCH)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{dump}: not a dump of an update ({error}); pass a folder RUN/nonfinite/step-N") from None


def compute(learner: Learner, batch: Batch) -> dict[str, float | None]:
    """The figures of the optimiser step on `batch`, as the learner computes them before it applies anything."""
    from grpo.training.batch import active_sequences
    from grpo.training.learner import UNMEASURED
    from grpo.training.loss_metrics import merge_metrics

    learner.policy.model.train()
    metrics = learner.backpropagate(
        active_sequences(batch.groups), learner.totals(batch.groups, learner.entropies(batch.groups))
    )
    return {**UNMEASURED, "grad_norm": learner.clip_gradients(), **merge_metrics(metrics)}


class Trace:
    """Finds the first non-finite value of a computation. `first` names it."""

    def __init__(self) -> None:
        self.first: str | None = None

    def see(self, where: str, value: Any) -> None:
        """Look at `value`, a tensor or a collection of some; what is no tensor is passed over."""
        if self.first is not None:
            return
        for tensor in tensors(value):
            bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
            if bad:
                self.first = f"{where}: {bad} of {tensor.numel()} values"
                return

    def inputs(self, batch: Batch, learner: Learner) -> None:
        """Look at what the computation starts from."""
        import torch

        for number, sequence in enumerate((s for group in batch.groups for s in group.sequences), 1):
            self.see(f"the advantage of sequence {number}", torch.tensor(sequence.advantage))
            self.see(f"the rollout's logprobs of sequence {number}", torch.tensor(sequence.rollout_logprobs))
            self.see(f"the old logprobs of sequence {number}", sequence.old_logprobs)
        for name, parameter in learner.policy.model.named_parameters():
            self.see(f"the weight {plain_name(name)}", parameter)

    @contextmanager
    def watching(self, learner: Learner) -> Iterator[None]:
        """Within, every module's output, every loss and every gradient of `learner` is looked at."""
        handles = []
        for name, module in learner.policy.decoder.named_modules():

            def looked(
                module: Any, given: Any, output: Any, where: str = f"the output of {name or 'the model'}"
            ) -> None:
                self.see(where, output)

            handles.append(module.register_forward_hook(looked))
        for name, parameter in learner.policy.model.named_parameters():
            if parameter.requires_grad:
                where = f"the gradient of {plain_name(name)}"
                handles.append(parameter.register_hook(lambda gradient, where=where: self.see(where, gradient)))
        score, loss = learner.score, learner.loss

        def scored(*arguments: Any, **named: Any) -> Any:
            result = score(*arguments, **named)
            self.see("the logprobs", result.logprobs)
            self.see("the entropy", result.entropy)
            return result

        def lost(*arguments: Any) -> Any:
            result = loss(*arguments)
            self.see("the loss", result[0])
            return result

        learner.score, learner.loss = scored, lost  # type: ignore[method-assign]
        try:
            yield
        finally:
            learner.score, learner.loss = score, loss  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)


def plain_name(name: str) -> str:
    """A parameter's name without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


def table(result: Replay) -> str:
    """The result for people."""
    lines = [f"left out because {result.problem}", "", f"{'':32}{'recorded':>16}{'now':>16}"]
    for name in result.recorded or result.figures:
        shown = [figure(values.get(name)) for values in (result.recorded, result.figures)]
        lines.append(f"{name:32}{shown[0]:>16}{shown[1]:>16}")
    where = "all values are finite here" if result.first is None else f"first non-finite value in {result.first}"
    return "\n".join([*lines, "", where])


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.replay`."""
    result = argparse.ArgumentParser(prog="python -m grpo.replay", description=(__doc__ or "").split("\n")[0])
    result.add_argument("dump", type=Path, metavar="DUMP", help="a folder nonfinite/step-N in a run folder")
    result.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    return command("grpo.replay", lambda: run(parsed))


def run(parsed: argparse.Namespace) -> None:
    """Print what computing the update again gives. Raises UserError."""
    quiet_libraries(False)
    print(printable(table(replay(parsed.dump, parsed.set))))


if __name__ == "__main__":
    sys.exit(main())
