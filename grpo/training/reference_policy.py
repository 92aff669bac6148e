"""The model that the KL penalty holds the policy to: the adapter as the run found it, or the base.

The starting adapter is kept in the run folder, so that a resumed run has the same reference. A fresh adapter changes
nothing, and then there is nothing to keep. For how the reference takes the adapter's place see `Policy.reference`.
"""

from __future__ import annotations

from pathlib import Path

from grpo.config.schema import Loss
from grpo.distributed.ranks import Ranks
from grpo.policy.full_policy import FullPolicy
from grpo.policy.policy import Policy
from grpo.run.checkpoint import REFERENCE, replace_folder


def set_reference(policy: Policy, settings: Loss, run: Path, *, resume: bool, ranks: Ranks | None = None) -> None:
    """Settle the reference of the run in folder `run`, before any step and before a checkpoint is loaded.

    With `resume` the adapter becomes, where the run kept one, the one that it started from. Of several `ranks` the
    first reads and writes the folder.
    """
    ranks = ranks or Ranks()
    policy.forget_reference()
    if isinstance(policy, FullPolicy):  # which has the weights of the start now, in a run that is resumed too
        if settings.beta > 0:
            policy.freeze_reference(settings.reference_storage)
        return
    if settings.beta == 0 or settings.reference == "base":
        return
    folder = run / REFERENCE
    if resume and ranks.first and folder.exists():
        policy.load_adapter(folder)
    if resume:
        ranks.broadcast_parameters(policy.parameters())
    if policy.adapter_is_zero():
        return
    policy.remember_reference()
    if not resume and ranks.first:
        replace_folder(folder, policy.save_adapter)
