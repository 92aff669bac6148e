"""grpo/export/push.py and card.py: what reaches the hub, what the card says, and that nothing half sent is called done.

The hub is a server on the loopback address (tests/helpers/hub_server.py); huggingface_hub is the real one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load

from grpo.export.__main__ import main
from grpo.export.card import public
from grpo.sft.config import parse_sft_config, sft_config_toml
from tests.helpers.adapters import logits, train_nothing
from tests.helpers.hub_server import TOKEN, Hub, hub_server
from tests.helpers.paths import ROOT
from tests.helpers.report_run import run_config, write_run
from tests.helpers.tiny import save_tiny
from tests.helpers.vocabularies import SIZE, byte_level, save_tokenizer

NAME = "me/sums"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with metrics and held-out figures, and an adapter on a base in `secret_place/base`."""
    folder = tmp_path_factory.mktemp("secret_place")
    base = folder / "base"
    model = save_tiny(base, "llama", vocab_size=SIZE)
    save_tokenizer(byte_level(digits=True), base, bos=False)
    rewards = [
        {"function": "numeric_answer", "weight": 2.0},
        {"function": f"{folder / 'scores.py'}:brevity", "weight": 0.5},
    ]
    made = folder / "run"
    config = run_config(made, model={"name": str(base), "revision": "abc"}, train={"max_steps": 20})
    config = config.model_copy(update={"rewards": [type(config.rewards[0]).model_validate(one) for one in rewards]})
    write_run(made, 20, config=config)
    train_nothing(model, made / "adapter", base)
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_an_adapter_is_private_whole_and_says_how_it_was_made(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--push", NAME]) == 0
    said = capsys.readouterr().out
    assert "published " in said and said.index("made the private repository") < said.index("published ")
    assert hub.repositories[NAME]["private"] and hub.repositories[NAME]["commits"] == 1
    files = hub.files(NAME)
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "curves.png"} <= files.keys()
    assert load(files["adapter_model.safetensors"]) and files["curves.png"].startswith(b"\x89PNG")
    everything = b"".join(files.values())
    assert TOKEN.encode() not in everything and b"secret_place" not in everything and b"hunter2" not in everything
    text = files["README.md"].decode()
    for part in (
        "`base` at revision `abc`", "LoRA", "| `numeric_answer` | 2 |", "| `brevity` | 0.5 |", "strict accuracy",
        "![Curves of the run](curves.png)", "AutoPeftModelForCausalLM", "vllm serve", "ollama create", "torch ",
        "`loss.loss_type`", "scores.py:brevity", "20 steps",
    ):  # fmt: skip
        assert part in text, part
    assert "--base-id OWNER/NAME" in said
    assert not list(run.glob("exports/.push*")), "the exported files were of a moment"


def test_the_pushed_adapter_loads_in_peft(run: Path, hub: Hub, tmp_path: Path) -> None:
    assert main([str(run), "--push", NAME]) == 0
    for name, content in hub.files(NAME).items():
        (tmp_path / name).write_bytes(content)
    config = (tmp_path / "adapter_config.json").read_text().replace('"base"', f'"{run.parent / "base"}"')
    (tmp_path / "adapter_config.json").write_text(re.sub(r'"revision": "abc"', '"revision": null', config))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(("form", "weights"), [("merged-16bit", "model.safetensors"), ("gguf", "run-f16.gguf")])
def test_merged_models_and_gguf_files_are_pushed_with_their_own_card(
    form: str, weights: str, run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run), "--push", NAME, "--to", form, "--public", "--base-id", "maker/base", "--no-check"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert not hub.repositories[NAME]["private"]
    text = hub.files(NAME)["README.md"].decode()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "maker/base" and "grpo" in front["tags"]
    assert front["base_model_relation"] == ("finetune" if form == "merged-16bit" else "quantized")
    assert weights in hub.files(NAME) and (form != "gguf" or "Modelfile" in hub.files(NAME))


def test_a_dry_run_shows_the_card_and_asks_nobody(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--push", NAME, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Would publish to {NAME} (private)") and "# sums" in shown and "curves.png" in shown
    assert hub.requests == [] and not hub.repositories


def test_an_adapter_of_no_run_and_a_supervised_run_have_cards_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    assert main([str(tmp_path / "adapter"), "--push", NAME, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "A LoRA adapter for `base`. Made with grpo" in shown and "## Results" not in shown
    supervised = tmp_path / "sft"
    shutil.copytree(run / "adapter", supervised / "adapter")
    tables = {"model": {"name": str(run.parent / "base")}, "sft": {"hub": "maker/data"}}
    (supervised / "config.toml").write_text(sft_config_toml(parse_sft_config(tables)))
    (supervised / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    assert main([str(supervised), "--push", NAME, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "trained supervised, on examples of maker/data" in shown and "| loss |  | 2 | 2 |" in shown
    assert "- maker/data" in shown and "`sft.train_on`" in shown and "Supervised fine-tuning by TRL" in shown


FAULTS = [
    ({"PUT /blobs": 413}, "nothing was published, and the repository is empty", 0),
    ({"/commit/": 400}, "nothing was published, and the repository is empty", 0),
    ({"/commit/": 412}, "the repository was changed meanwhile; push again; nothing was published", 0),
    ({"/preupload/": 403}, "does not let you write there", 0),
    ({"/revision/": 404}, "the commit was made, but what it holds could not be read back", 1),
    ({"/repos/create": 403}, "does not let you write there; push to a name of your own", None),
    ({"/api/whoami": 401}, "the hub does not know you; log in with `hf auth login`", None),
]


@pytest.mark.parametrize(("fail", "sentence", "commits"), FAULTS, ids=[next(iter(fault[0])) for fault in FAULTS])
def test_what_fails_in_the_middle_is_said_and_never_called_done(
    fail: dict[str, int], sentence: str, commits: int | None, run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail = fail
    assert main([str(run), "--push", NAME]) == 2
    out, err = capsys.readouterr()
    assert sentence in err and "published http" not in out and TOKEN not in err
    assert (hub.repositories[NAME]["commits"] if commits is not None else None) == commits
    if commits == 0:
        hub.fail = {}
        assert main([str(run), "--push", NAME]) == 0 and "published http" in capsys.readouterr().out


def test_a_file_that_the_hub_lists_otherwise_is_not_done(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.truncates = "adapter_model.safetensors"
    said = refusal(capsys, run, "--push", NAME)
    assert "adapter_model.safetensors was sent with" in said and "the repository is not whole, so push again" in said


def test_what_is_there_already_is_respected(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories[NAME] = {"private": False, "files": {"model.safetensors": b"x"}, "commits": 1}
    assert f"{NAME} exists and is public; add --public" in refusal(capsys, run, "--push", NAME)
    said = refusal(capsys, run, "--push", NAME, "--public")
    assert "already holds model.safetensors, which this push does not replace" in said
    assert hub.files(NAME) == {"model.safetensors": b"x"}
    hub.repositories[NAME] = {"private": True, "files": {"README.md": b"old"}, "commits": 1}
    assert "exists and is private; leave out --public" in refusal(capsys, run, "--push", NAME, "--public")
    assert main([str(run), "--push", NAME]) == 0 and hub.files(NAME)["README.md"] != b"old"
    hub.role = "read"
    assert "token may only read" in refusal(capsys, run, "--push", NAME)


def test_options_that_make_no_sense_are_a_sentence(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sums", "a/b/c", "me/../x", "me/a--b", "me/a b"):
        assert f"--push {name}: no name of a repository" in refusal(capsys, run, "--push", name)
    assert "--public says how to publish; add --push" in refusal(capsys, run, "--to", "adapter", "--public")
    assert "--to is missing" in refusal(capsys, run)
    assert hub.requests == []


def test_without_a_token_and_offline_it_ends_before_anything_is_exported(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "the hub does not know you; log in with" in refusal(capsys, run, "--push", NAME, "--out", tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(capsys, run, "--push", NAME)
    assert not (tmp_path / "out").exists()


def test_the_endpoint_of_the_environment_is_pushed_to(run: Path, hub: Hub) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "grpo.export", str(run), "--push", NAME]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"published {hub.url}/{NAME}" in done.stdout and TOKEN not in done.stdout + done.stderr


def test_paths_are_cut_to_their_last_names_and_nothing_else_is() -> None:
    kept = {"a": "Qwen/Qwen3-4B", "b": "pkg.mod:function", "c": "package:name/file.gguf", "d": ["{x}/{y}", 3, None]}
    assert public(kept) == kept
    assert public({"p": ["/home/me/scores.py:brevity", "~/models/x", "./data/rows.jsonl"]}) == {
        "p": ["scores.py:brevity", "x", "rows.jsonl"]
    }
