"""Whole runs in environments: tokens are kept exactly, delays change no bit, a resumed run is the same run.

The model is tiny and random, vLLM is real.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config.schema import parse_config
from grpo.environments.pool import Ended, Lost
from grpo.train import main
from tests.helpers.paths import ROOT
from tests.helpers.same_run import differences
from tests.helpers.seeing import noise
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny_run import read_metrics, run_tables, write_config

pytestmark = pytest.mark.vllm

FILE = ROOT / "tests" / "helpers" / "environments_to_try.py"
SIZES = {"max_completion_length": 150, "max_prompt_length": 400}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("episodes")
    save_small_chat_model(folder / "model")
    return folder


def tables(home: Path, name: str, environment: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of a few steps with `environment`, whose program is one of those to try."""
    settings = {"max_turn_tokens": 10, "latency_steps": 3, **environment}
    found = run_tables(home, environment=settings, rollout=SIZES, **changes)
    found.pop("rewards")
    found["checkpoint"]["output_dir"] = str(home / name)
    return found


def start(home: Path, name: str, environment: dict[str, Any], *arguments: str, **changes: Any) -> int:
    return main([str(write_config(home / f"{name}.toml", tables(home, name, environment, **changes))), *arguments])


def letters(delay: float, **more: Any) -> dict[str, Any]:
    return {"program": f"{FILE}:letters", "options": {"delay": delay}, **more}


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    """A run of six steps with tools that answer at once."""
    assert start(home, "straight", letters(0.0)) == 0
    return home / "straight"


def test_episodes_of_several_turns_are_trained_on(straight: Path) -> None:
    metrics = read_metrics(straight)
    assert [entry["environment/turns"] for entry in metrics] == [3.0] * 6
    assert all(entry["environment/environment_tokens"] > 30 for entry in metrics)
    assert all(entry["completion_length"] <= 30 for entry in metrics), "what the environment said is not counted"
    assert all(entry["mismatch_logp_max"] < 1e-4 for entry in metrics), "trainer and vLLM agree on every turn"
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.2


def test_slow_tools_and_a_resumed_run_change_no_bit(home: Path, straight: Path) -> None:
    slow = letters(0.1, processes=3)
    assert start(home, "slow", slow, "--set", "train.max_steps=3") == 0
    assert main([str(home / "slow.toml"), "--resume"]) == 0
    (home / "slow" / "completions" / "step-3.jsonl").unlink()  # its last step, when it ended there
    assert differences(straight, home / "slow") == []


def test_a_changed_schedule_is_refused_on_resume(
    home: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(home / "straight.toml"), "--resume", "--set", "environment.latency_steps=5"]) == 2
    message = capsys.readouterr().err
    assert "environment.latency_steps = 5 does not fit the run in" in message and "which has 3" in message


def test_lost_episodes_are_left_out_and_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "moody.py").write_text(
        "import os, random\n"
        "async def play(row, sample):\n"
        "    turn = await sample(row['prompt'])\n"
        "    if random.random() < 0.5: os._exit(3)\n"
        "    more = await sample([*row['prompt'], turn.message, {'role': 'user', 'content': 'More.'}])\n"
        "    return {'turn_rewards': [len(turn.text) + random.random(), len(more.text)]}\n"
    )
    by_turn = {"train": {"max_steps": 2}, "loss": {"advantage_level": "turn"}}
    assert start(home, "moody", {"program": f"{home / 'moody.py'}:play"}, **by_turn) == 0
    assert "episodes are left out: it ended its process with exit code 3" in capsys.readouterr().out
    lost = [entry["environment/lost"] for entry in read_metrics(home / "moody")]
    assert all(0 < share < 1 for share in lost)
    assert read_metrics(home / "moody")[-1]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("on_error", "sentence"),
    [
        ("mask", "every episode of a step failed"),
        pytest.param("stop", "mend it, or", marks=pytest.mark.wide),  # another start of vLLM
    ],
)
def test_a_run_of_which_nothing_is_left_ends(
    home: Path, capsys: pytest.CaptureFixture[str], on_error: str, sentence: str
) -> None:
    environment = {"program": f"{FILE}:raises", "on_error": on_error}
    assert start(home, f"raises-{on_error}", environment, train={"max_steps": 2}) == 2
    message = capsys.readouterr().err
    assert sentence in message and "no such luck" in message


class Played:
    """Episodes of one environment, played by a session's engine."""

    def __init__(self, home: Path, program: str, **changes: Any):
        from grpo.session import open_session

        environment = {"program": f"{FILE}:{program}", **changes}
        self.config = parse_config(tables(home, "played", environment))
        self.session = open_session(self.config)

    def play(self, count: int = 4, **options: Any) -> list[Any]:
        from grpo.training.environment import make_player, start_environment

        sampling = self.session.sampling(1.0, 100)
        prompt = [{"role": "user", "content": "Say it."}]
        with start_environment(self.config) as pool:
            assert pool is not None
            player = make_player(self.session, pool)
            found = player.play([(number, {"prompt": prompt}, number + 1) for number in range(count)], sampling)
            return sorted(found, key=lambda episode: episode.number)

    def use(self, name: str | None, **changes: Any) -> None:
        environment = changes if name is None else {"program": f"{FILE}:{name}", **changes}
        self.config = parse_config(tables(self.home, "played", environment))
        self.session.config = self.config

    home: Path


@pytest.fixture(scope="module")
def played(home: Path) -> Iterator[Played]:
    found = Played(home, "letters")
    found.home = home
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in found.session.policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    found.session.engine.sync_adapter()
    yield found
    found.session.close()


def test_answers_come_together_and_none_sooner_than_its_latency(played: Played, tmp_path: Path) -> None:
    (tmp_path / "unequal.py").write_text(
        "async def play(row, sample):\n"
        "    messages, member = list(row['prompt']), row['member']\n"
        "    for turn in range(3):\n"
        "        said = await sample(messages, max_tokens=3 + 2 * member + turn)\n"
        "        messages += [said.message, {'role': 'user', 'content': 'Go on.'}]\n"
        "    return 1.0\n"
    )
    from grpo.training.environment import make_player, start_environment

    latency, asked, taken = 5, {}, []
    played.use(None, program=f"{tmp_path / 'unequal.py'}:play", latency_steps=latency, max_turn_tokens=20)
    prompt = [{"role": "user", "content": "Say it."}]
    with start_environment(played.config) as pool:
        assert pool is not None
        player = make_player(played.session, pool)
        hand_over, admit = player.hand_over, player.admit

        def noted(episode: Any, message: Any) -> None:
            asked[episode.number] = player.steps
            hand_over(episode, message)

        def admitted(episode: Any, said: Any) -> Iterator[Any]:
            if episode.number in asked:
                taken.append((player.steps, player.steps - asked[episode.number]))
            return admit(episode, said)

        player.hand_over, player.admit = noted, admitted
        starts = [(number, {"prompt": prompt, "member": number}, number + 1) for number in range(4)]
        found = list(player.play(starts, played.session.sampling(1.0, 100)))
    assert all(isinstance(each.result, Ended) for each in found) and len(taken) == 12
    assert all(step % latency == 0 and latency <= waited < 2 * latency for step, waited in taken)
    assert len({step for step, _ in taken}) < 12, "some came together"


def test_what_was_sampled_is_what_is_scored(played: Played) -> None:
    played.use("letters")
    for episode in played.play():
        (transcript,) = episode.transcripts
        text = played.session.tokenizer.decode(transcript.ids)
        assert text.count("characters. Again.\nassistant: ") == 2 and text.startswith("user: Say it.\nassistant: ")
        assert sum(transcript.sampled) == len(transcript.logprobs) and transcript.sampled[-1]
        scored = played.session.policy.score(
            [transcript.prompt_ids], [transcript.tokens], temperature=1.0, sampled=transcript.sampled
        )
        assert (scored.logprobs - torch.tensor(transcript.logprobs)).abs().max() < 1e-4
        whole = played.session.policy.score([transcript.prompt_ids], [transcript.tokens], temperature=1.0)
        assert torch.allclose(whole.logprobs[torch.tensor(transcript.sampled)], scored.logprobs, atol=1e-6)


def test_turns_find_the_keys_and_values_of_the_turns_before(played: Played) -> None:
    played.use("letters", max_turn_tokens=40)
    played.config.rollout.max_completion_length = 300
    manager = played.session.engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    hits: list[int] = []
    original = manager._manager.get_computed_blocks

    def counted(request: Any) -> Any:
        found = original(request)
        hits.append(found[1])
        return found

    manager._manager.get_computed_blocks = counted
    try:
        played.play(count=1)
    finally:
        del manager._manager.get_computed_blocks
    assert len(hits) == 3 and 0 <= hits[0] < hits[1] < hits[2]


def test_a_rewritten_history_begins_a_segment_of_its_own(played: Played) -> None:
    from grpo.policy.packing import packed_row
    from grpo.training.batch import TrainingSequence

    played.use("rewrites")
    for episode in played.play():
        first, second = episode.transcripts
        assert first.prompt_ids != second.prompt_ids and all(first.sampled) and all(second.sampled)
        sequence = TrainingSequence(first.prompt_ids, first.tokens, first.logprobs + second.logprobs, 1.0, False)
        assert sequence.trained == len(first.tokens)
        row = packed_row([first.prompt_ids, second.prompt_ids], [first.tokens, second.tokens])
        assert len(row.predicting) == len(first.tokens) + len(second.tokens)


AGENT = ROOT / "tests" / "helpers" / "agent_to_try.py"


def command(name: str) -> dict[str, Any]:
    return {"command": f"{sys.executable} -S {AGENT} {name}"}


def test_conversations_that_take_turns_keep_their_tokens(played: Played) -> None:
    played.use(None, **command("two_agents"))
    for episode in played.play(count=2):
        assert isinstance(episode.result, Ended) and episode.result.reward == 1.0, episode.result
        texts = [played.session.tokenizer.decode(one.ids) for one in episode.transcripts]
        assert [text[:16] for text in texts] == ["user: You are on", "user: You are tw"]
        for one, text in zip(episode.transcripts, texts, strict=True):
            assert text.count("user: Go on.") == 1 and one.sampled[0] and one.sampled[-1]
            scored = played.session.policy.score([one.prompt_ids], [one.tokens], temperature=1.0, sampled=one.sampled)
            assert (scored.logprobs - torch.tensor(one.logprobs)).abs().max() < 1e-4


def test_tokens_that_a_command_sends_are_continued(played: Played) -> None:
    played.use(None, **command("tokens"))
    for episode in played.play(count=2):
        (one,) = episode.transcripts
        assert episode.turns == 2 and one.sampled.count(False) == 1
        assert isinstance(episode.result, Ended) and episode.result.reward == len(one.ids) / 30 + 1 / 30


def test_rewards_for_other_turns_than_there_were_are_named(played: Played, tmp_path: Path) -> None:
    (tmp_path / "three.py").write_text(
        "async def play(row, sample):\n    await sample(row['prompt'])\n    return {'turn_rewards': [1, 2, 3]}\n"
    )
    played.use(None, program=f"{tmp_path / 'three.py'}:play")
    (episode,) = played.play(count=1)
    assert episode.result == Lost("returned 3 turn_rewards for 1 turns; return one for each")


def test_an_image_that_a_model_of_text_is_shown_is_named(played: Played, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(noise(16, 16, 0).data)
    (tmp_path / "shows.py").write_text(
        "async def play(row, sample):\n"
        f"    shown = [{{'type': 'image', 'image': {str(file)!r}}}, {{'type': 'text', 'text': 'What?'}}]\n"
        "    await sample([{'role': 'user', 'content': shown}])\n"
    )
    played.use(None, program=f"{tmp_path / 'shows.py'}:play")
    (episode,) = played.play(count=1)
    assert episode.result == Lost(
        "has a conversation that the model cannot be shown: the model is read as one of text alone; set model.images = "
        "true if it sees images"
    )


def test_an_episode_ends_where_there_is_no_room(played: Played) -> None:
    played.use("greedy", max_turns=3)
    assert [(each.turns, each.over) for each in played.play()] == [(3, "all 3 turns are taken")] * 4
    played.use("greedy", max_turns=50)
    for episode in played.play():
        assert episode.over == "there is no room for another turn" and episode.tokens <= 150 and episode.truncated
        assert episode.transcripts[-1].sampled[-1]


def test_long_observations_are_cut_and_say_so(played: Played) -> None:
    played.use("megabytes", max_observation_tokens=100)
    for episode in played.play():
        between = episode.transcripts[-1].sampled.count(False)
        assert 60 < between <= 100 and episode.cut_observations > 0
        assert "[cut: 10999" in played.session.tokenizer.decode(episode.transcripts[-1].tokens)


def test_the_gradient_is_that_of_an_explicit_mask(played: Played) -> None:
    played.use("letters")
    policy = played.session.policy
    transcripts = [episode.transcripts[0] for episode in played.play()]
    signs = [1.0 if number % 2 else -0.5 for number in range(len(transcripts))]

    def gradient(masked: bool) -> torch.Tensor:
        policy.model.zero_grad()
        if masked:
            prompts, tokens = [one.prompt_ids for one in transcripts], [one.tokens for one in transcripts]
            mask = [drawn for one in transcripts for drawn in one.sampled]
            logprobs = policy.score(prompts, tokens, temperature=1.0, sampled=mask).logprobs
            weight = torch.tensor([s for s, one in zip(signs, transcripts, strict=True) for _ in one.logprobs])
            (logprobs * weight).sum().backward()
        else:
            for sign, one in zip(signs, transcripts, strict=True):
                logprobs = policy.score([one.prompt_ids], [one.tokens], temperature=1.0).logprobs
                (logprobs * torch.tensor(one.sampled) * sign).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])

    explicit, ours = gradient(False), gradient(True)
    policy.model.zero_grad()
    assert float((ours - explicit).norm() / explicit.norm()) < 5e-6


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"tools": ["a.py:f"], "program": "a.py:g"}, "; program and tools are set"),
        ({}, "; none of them is set"),
        ({"rollout_func": "a.py:f"}, "write the same loop as `program`"),
    ],
)
def test_ways_in_exclude_each_other(
    home: Path, capsys: pytest.CaptureFixture[str], environment: dict[str, Any], sentence: str
) -> None:
    assert start(home, "refused", environment) == 2
    assert sentence in capsys.readouterr().err


def test_a_template_without_tools_is_refused_with_tools(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(home, "no-tools", {"tools": [f"{FILE}:add"]}) == 2
    message = capsys.readouterr().err
    assert (
        "chat template cannot continue a conversation after a tool's message: it does not show which tools" in message
    )


def test_dumps_bring_episodes_back() -> None:
    from grpo.rollout.types import Segment
    from grpo.training.batch import TrainingSequence
    from grpo.training.dump import restored_sequence, sequence_state

    more = [Segment([7], [8, 9], [False, True])]
    kept = TrainingSequence(
        [1, 2],
        [3, 4, 5],
        [-1.0, -2.0],
        0.5,
        False,
        sampled=[True, False, True],
        rewritten=more,
        token_advantages=[0.1, 0.2, 0.3],
    )
    assert restored_sequence(json.loads(json.dumps({})) | sequence_state(kept)) == kept
