"""What vLLM's host does for every token, made cheaper: its scheduler and its sampler, subclassed. For engine.py alone.

A step of many sequences is bound by the host: vLLM's Python spends some 40 microseconds a sequence on it, and the GPU
waits. Three of its habits are dropped here: asking for a KV block at every token, building lists of logprobs and an
output object for every token, and checking every token of every sequence for whatever a request could have asked for.
Anything out of the ordinary is left to vLLM's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.sample.sampler import Sampler

from grpo.kernels.sample import sample_tokens
from grpo.rollout.route_recorder import RouteRecorder
from grpo.rollout.types import SamplingSettings


class BlockBoundaryManager:
    """vLLM's manager of KV blocks, asked only at the first and the last token of a block.

    vLLM asks at every token of every sequence, a fifth of what the host does in a step; in between the answer is always
    "none needed" and "nothing new to share".
    """

    def __init__(self, manager: Any, block_size: int):
        self._manager, self._block_size = manager, block_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def allocate_slots(
        self, request: Any, num_new_tokens: int, *, num_lookahead_tokens: int = 0, **options: Any
    ) -> Any:  # fmt: skip
        plain = num_new_tokens == 1 and not num_lookahead_tokens and not options
        if plain and 0 < request.num_computed_tokens % self._block_size < self._block_size - 1:
            return self._manager.empty_kv_cache_blocks
        return self._manager.allocate_slots(
            request, num_new_tokens, num_lookahead_tokens=num_lookahead_tokens, **options
        )

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        if num_computed_tokens % self._block_size == 0:
            self._manager.cache_blocks(request, num_computed_tokens)


class LogprobCollector:
    """What the scheduler gathers for the engine in one call of `generate`, and how it is to hand tokens on.

    `deliver_on_finish`: a request's tokens are handed on when it has finished, all at once. `logprobs`: those of the
    sampled tokens, by vLLM's own name of a request. `hashes`: where requests are `continued`, those of the blocks of
    tokens of finished ones, by what the engine calls them.
    """

    def __init__(self) -> None:
        self.recorder: RouteRecorder | None = None
        """Of a mixture of experts."""
        self.begin(deliver_on_finish=False)

    def begin(self, *, deliver_on_finish: bool, continued: bool = False) -> None:
        """Forget every request."""
        self.deliver_on_finish, self.continued = deliver_on_finish, continued
        self.hashes: dict[str, list[bytes]] = {}
        self.ended: dict[str, list[bytes]] = {}
        """The same of requests that have not been taken, by vLLM's name."""
        self.logprobs: dict[str, list[float]] = {}
        self.routes: dict[str, Tensor] = {}
        """As in `Completion`, by vLLM's own name of a request."""
        self._names: dict[str, str] = {}

    def enter(self, request_id: str, name: str) -> None:
        """Collect for `request_id`, which vLLM calls `name`."""
        self._names[request_id] = name
        self.logprobs[name] = []

    def take(self, request_id: str) -> tuple[list[float], Tensor | None]:
        """Logprobs of a finished request's tokens, in order, and the experts of those that were fed; possibly of one
        more than it was given."""
        name = self._names.pop(request_id)
        if name in self.ended:
            self.hashes[request_id] = self.ended.pop(name)
        return self.logprobs.pop(name), self.routes.pop(name, None)


class ContinuedHasher:
    """vLLM's hashes of the blocks of a request's tokens. Those of the request that it continues are taken over: vLLM
    would make them again for every turn of a conversation."""

    def __init__(self, hasher: Callable[[Any], list[bytes]]):
        self._hasher = hasher
        self.known: list[bytes] = []
        """Of the first blocks of the request that is made next."""

    def __call__(self, request: Any) -> list[bytes]:
        if self.known and not request.block_hashes:
            request.block_hashes.extend(self.known)
        self.known = []
        return self._hasher(request)


def rollout_scheduler(kind: type, collector: LogprobCollector) -> type:
    """A subclass of vLLM's scheduler class `kind` (Scheduler or AsyncScheduler) that fills `collector`."""

    class RolloutScheduler(kind):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            groups = self.kv_cache_config.kv_cache_groups
            self._blocks_end_together = {group.kv_cache_spec.block_size for group in groups} == {self.block_size}
            if self._blocks_end_together:
                self.kv_cache_manager: Any = BlockBoundaryManager(self.kv_cache_manager, self.block_size)

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
            requests = self.requests.copy()  # vLLM forgets those that finish
            collect_logprobs(model_runner_output, requests, collector.logprobs)
            if not collector.deliver_on_finish:
                return super().update_from_output(scheduler_output, model_runner_output)
            if self._blocks_end_together:
                rest = self._append_tokens(scheduler_output.num_scheduled_tokens, model_runner_output)
                scheduler_output = copy.copy(scheduler_output)
                scheduler_output.num_scheduled_tokens = rest
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            for of_client in outputs.values():
                of_client.outputs = [output for output in of_client.outputs if output.finish_reason is not None]
                for output in of_client.outputs:
                    output.new_token_ids = list(requests[output.request_id].output_token_ids)
            return outputs

        def _free_request(self, request: Any, *arguments: Any, **options: Any) -> Any:
            if collector.continued and len(request.block_hashes) == request.num_tokens // self.block_size:
                collector.ended[request.request_id] = request.block_hashes
            if collector.recorder is not None and request.request_id in collector.logprobs:
                collector.routes[request.request_id] = collector.recorder.routes(self, request)
            return super()._free_request(request, *arguments, **options)

        def _append_tokens(self, scheduled: dict[str, int], output: Any) -> dict[str, int]:
            """Give running requests their next token, if nothing else follows from it. Returns the rest of `scheduled`.

            Left to vLLM: what is not one token after another (prompts, their first token, requests that have been
            preempted), a token that ends its request, and one that completes a KV block.
            """
            sampled, row_of = output.sampled_token_ids, output.req_id_to_index
            rest: dict[str, int] = {}
            longest, block_size = self.max_model_len - 1, self.block_size
            requests, running = self.requests, RequestStatus.RUNNING
            for name, count in scheduled.items():
                request = requests.get(name)
                tokens: list[int] = sampled[row_of[name]] if sampled else []
                if count != 1 or len(tokens) != 1 or request is None or request.status is not running:
                    rest[name] = count
                    continue
                known, answered = request._all_token_ids, request._output_token_ids
                length, token = len(known), tokens[0]
                if (
                    request.num_preemptions
                    or not 0 < len(answered) < request.max_tokens - 1
                    or length >= longest
                    or length % block_size == 0
                    or token in request.sampling_params.all_stop_token_ids
                ):
                    rest[name] = count
                    continue
                if (length + 1) % block_size:
                    answered.append(token)  # as `append_output_token_ids` does where no block of tokens is complete,
                    known.append(token)  # so that there is none to be hashed
                else:
                    request.append_output_token_ids(token)
                request.num_in_flight_tokens -= 1
                if request.num_output_placeholders:  # with asynchronous scheduling
                    request.num_output_placeholders -= 1
            return rest

    return RolloutScheduler


def collect_logprobs(output: Any, requests: dict[str, Any], logprobs: dict[str, list[float]]) -> None:
    """Take the sampled tokens' logprobs out of a step's `output` and enter them in `logprobs`.

    A token's place is the number of tokens that its request has: vLLM drops a token that was on its way when its
    request was preempted, in some cases, and the one sampled in its stead takes its place here too.
    """
    if output.logprobs is None:
        return
    column = output.logprobs.logprobs[:, 0].tolist()
    for name, tokens, logprob in zip(output.req_ids, output.sampled_token_ids, column, strict=True):
        if tokens and name in requests and name in logprobs:  # no tokens: the row is part of a prompt
            logprobs[name][requests[name].num_output_tokens :] = (logprob,)
    output.logprobs = None


class OnePassSampler(Sampler):
    """vLLM's sampler, with plain temperature sampling in one pass over the logits (kernels/sample.py).

    vLLM's own makes float32 copies, probabilities, noise and ranks of [sequences, vocabulary]: half a millisecond of a
    step of 128 sequences. Whatever else is asked for (greedy, top-p, top-k, min-p) is left to it.
    """

    _is_plain = False

    def begin(self, sampling: SamplingSettings, seed: int) -> None:
        """Prepare for one call of `generate`; `seed` decides its random numbers."""
        filtered = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
        self._is_plain, self._seed, self._step = sampling.temperature > 0 and not filtered, seed, 0

    def forward(self, logits: Tensor, sampling_metadata: Any, *arguments: Any, **options: Any) -> SamplerOutput:
        if not self._is_plain:
            return super().forward(logits, sampling_metadata, *arguments, **options)
        self._step += 1
        seed = (self._seed * 1_000_003 + self._step) % 2**63
        tokens, logprobs = sample_tokens(logits, sampling_metadata.temperature, seed)
        # The rank of a token is not asked for; its place must be filled.
        return SamplerOutput(tokens[:, None], LogprobsTensors(tokens[:, None], logprobs[:, None], tokens))
