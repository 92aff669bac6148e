"""grpo/sft/__main__.py and its parts: which tokens are trained on, what is refused, and a whole run with its folder."""

from __future__ import annotations

import errno
import json
import runpy
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.errors import UserError
from grpo.rewards.correctness import correctness
from grpo.rewards.format import soft_format, strict_format
from grpo.rewards.integer import integer
from grpo.rewards.xml_count import xml_count
from grpo.sft.__main__ import main
from grpo.sft.config import Sft, parse_sft_config, read_sft_config, sft_config_toml
from grpo.sft.data import conversation, load_data, load_examples, read_rows
from tests.helpers.paths import ROOT
from tests.helpers.small_chat import TEMPLATE, save_small_chat_model
from tests.helpers.tiny_run import read_metrics, run_tables, save_rewards, save_tiny_chat_model, write_config

ENDED = TEMPLATE.replace("+ '\n'", "+ (eos_token if m['role'] == 'assistant' else '') + '\n'")
EOS = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(model):
    found = AutoTokenizer.from_pretrained(model)
    assert "eos_token" in ENDED
    found.chat_template = ENDED
    return found


def rows_file(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def examples(folder, rows, tokenizer, **settings):
    sft = Sft(path=rows_file(folder, rows), **settings)
    return load_examples(sft, read_rows(sft, sft.split), tokenizer, [EOS], seed=0)


def trained(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != -100])


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FORMS = [
    {"messages": CHAT},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"prompt": "Hi", "completion": "Hello"},
    {"instruction": "Hi", "input": "", "output": "Hello"},
    {"instruction": "Hi", "output": "Hello"},
]


@pytest.mark.parametrize("row", FORMS, ids=lambda row: "+".join(row))
def test_every_usual_form_of_a_row_is_the_same_conversation(row, tmp_path, tokenizer):
    (example,) = examples(tmp_path, [row], tokenizer).examples
    assert tokenizer.decode(example.input_ids) == "user: Hi\nassistant: Hello<eos>\n"
    assert trained(example, tokenizer) == "Hello<eos>"
    assert [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != -100] == [
        label for label in example.labels if label != -100
    ]


def test_alpacas_input_and_columns_of_ones_own_are_merged_into_one_prompt():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "unit": ""}
    assert conversation(row, Sft(path="x"), "row 1")[0][0]["content"] == "Add\n\n1 2"
    own = Sft(path="x", prompt="{instruction}[[ in {unit}]]: {input}[[ ({output})]]", completion="{output}{unit}")
    assert [m["content"] for m in conversation(row, own, "row 1")[0]] == ["Add: 1 2 (3)", "3"]


def test_every_answer_of_a_conversation_is_trained_on_up_to_its_end_token(tmp_path, tokenizer):
    rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(7)]
    data = examples(tmp_path, rows, tokenizer, conversation_extension=3, system_prompt="Be short")
    texts = [trained(example, tokenizer) for example in data.examples]
    assert [text.count("<eos>") for text in texts] == [3, 3, 1] and data.notices == []
    assert sorted("".join(texts).replace("<eos>", " ").split()) == [f"a{n}" for n in range(7)]
    assert all(tokenizer.decode(e.input_ids).count("system: Be short") == 1 for e in data.examples)
    assert texts != [
        trained(e, tokenizer) for e in examples(tmp_path, rows, tokenizer, conversation_extension=2).examples
    ]


def test_a_template_without_an_end_token_gets_one_and_a_notice_with_the_remedy(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE
    data = examples(tmp_path, [{"messages": [*CHAT, *CHAT]}, {"messages": CHAT}], tokenizer)
    assert all(example.input_ids[-1] == example.labels[-1] == EOS for example in data.examples)
    appended, inside = data.notices
    assert "ends 2 answers" in appended and "model.chat_template" in appended and "1 answers inside" in inside


def test_plain_text_ends_with_the_end_token_and_trains_on_the_completion_or_on_all(tmp_path, tokenizer):
    rows = [{"prompt": "2+2=", "completion": "4"}]
    data = examples(tmp_path, rows, tokenizer, chat=False)
    assert tokenizer.decode(data.examples[0].input_ids) == "2+2=4<eos>" and data.notices == []
    assert trained(data.examples[0], tokenizer) == "4<eos>"
    (whole,) = examples(tmp_path, rows, tokenizer, chat=False, completion_only_loss=False).examples
    assert whole.labels == whole.input_ids


def test_long_rows_are_dropped_and_counted_never_cut(tmp_path, tokenizer):
    rows = [{"prompt": "q", "completion": "a" * n} for n in (5, 500)]
    data = examples(tmp_path, rows, tokenizer, max_length=100)
    assert len(data.examples) == 1 and "1 of 2 sequences" in data.notices[0]
    for settings, message in (
        ({"max_length": 100, "overlong": "error"}, "conversation 2"),
        ({"max_length": 9}, "all 2"),
    ):
        with pytest.raises(UserError, match=message):
            examples(tmp_path, rows, tokenizer, **settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "reply": "!"}, "set sft.prompt and sft.completion"),
        ({"messages": CHAT[:1]}, "does not end with an answer"),
        ({"messages": [{"role": "user"}]}, '"role" and a text'),
        ({"conversations": [{"from": "critic", "value": "x"}]}, "human"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(row, message, tmp_path, tokenizer):
    with pytest.raises(UserError, match=message) as error:
        examples(tmp_path, [row], tokenizer)
    assert "row 1" in str(error.value)


def test_a_template_that_leaves_out_what_was_asked_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else '-' }}{% endfor %}"
    with pytest.raises(UserError, match="does not show the user's message 'Hi'"):
        examples(tmp_path, [{"messages": [*CHAT, *CHAT]}], tokenizer)


def tables(folder, model, **sft):
    return {
        "model": {"name": str(model), "load_in_4bit": False, "dtype": "float32", "device": "cpu"},
        "lora": {"r": 4, "lora_alpha": 8},
        "sft": {"path": str(folder / "rows.jsonl"), "max_length": 64, "per_device_train_batch_size": 2, **sft},
        "train": {"learning_rate": 1e-2, "max_steps": 4},
        "checkpoint": {"output_dir": str(folder / "run"), "save_steps": 2},
    }


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("train", "num_iterations", 2, "belongs to GRPO"),
        ("log", "samples", 2, "belongs to GRPO"),
        ("model", "max_seq_length", 64, "sft.max_length"),
        ("model", "full_finetuning", True, "is for GRPO"),
        ("eval", "num_generations", 2, "belongs to GRPO"),
        ("sft", "hub", "a/b", "one of path"),
        ("sft", "prompt", "{x}", "set both"),
        ("sft", "pakking", True, "packing"),
    ],
)
def test_what_has_no_meaning_in_a_supervised_run_is_refused(section, key, value, message, tmp_path):
    values = tables(tmp_path, "m")
    values[section] = {**values.get(section, {}), key: value}
    with pytest.raises(UserError, match=message):
        parse_sft_config(values)


def test_the_written_configuration_reads_as_the_same(tmp_path):
    config = parse_sft_config(tables(tmp_path, "m", prompt="{a}", completion="{b}"))
    (tmp_path / "c.toml").write_text(sft_config_toml(config))
    assert read_sft_config(tmp_path / "c.toml") == config


def loss_of(folder, sequences):
    """Mean negative log-likelihood of the labels by transformers' own model, one sequence at a time."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for example in sequences:
        with torch.no_grad():
            logits = plain(torch.tensor([example.input_ids])).logits[0, :-1].double()
        labels = torch.tensor(example.labels[1:])
        found.append(F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[labels != -100])
    return torch.cat(found).mean().item()


def test_a_run_learns_resumes_as_one_and_leaves_an_adapter(tmp_path, model, capsys):
    rows = [{"prompt": f"Say {n}", "completion": f"{n}!"} for n in range(33)]
    rows_file(tmp_path, rows)
    whole = write_config(tmp_path / "c.toml", {**tables(tmp_path, model), "eval": {"every": 3, "limit": 3}})
    assert main([str(whole)]) == 0
    message = capsys.readouterr().out
    run = tmp_path / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4] and metrics[-1]["loss"] < metrics[0]["loss"]
    assert "step 4/4  loss" in message and "ends 30 answers" in message
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["sequences"] == 30 and "loss" in summary["last"]
    assert "Held-out loss" in (run / "report.html").read_text()
    held_out = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in held_out] == [0, 3, 4] and "the last 3 rows are held out" in message
    sft = read_sft_config(whole).sft
    expected = load_examples(sft, rows[-3:], AutoTokenizer.from_pretrained(model), [EOS], seed=0).examples
    assert held_out[0]["eval/loss"] == pytest.approx(loss_of(model, expected), rel=1e-5)
    assert held_out[0]["eval/loss"] > held_out[-1]["eval/loss"] == summary["last"]["eval/loss"]

    assert main([str(whole), "--output", str(tmp_path / "cut"), "--set", "train.max_steps=2"]) == 0
    shutil.copytree(model, tmp_path / "moved")
    moved = ["--base", str(tmp_path / "moved")]
    assert main(["--resume", str(tmp_path / "cut"), *moved, "--set", "train.max_steps=4"]) == 0
    resumed, expected = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path / "cut", run))
    assert resumed.keys() == expected.keys() and all(resumed[name].equal(expected[name]) for name in expected)
    assert main(["--resume", str(run), "--set", "lora.r=8"]) == 2 and "[lora] is not that" in capsys.readouterr().err
    assert main(["--resume", str(run), "--set", "eval.limit=4"]) == 2 and "hold out other" in capsys.readouterr().err


def test_held_out_rows_are_a_split_or_the_last_ones_and_never_trained_on(tmp_path, tokenizer):
    rows_file(tmp_path, [{"prompt": "q", "completion": f"{n}"} for n in range(6)])
    (tmp_path / "data").mkdir()
    for split, count in (("train", 4), ("dev", 3)):
        lines = (json.dumps({"prompt": split, "completion": f"{n}"}) + "\n" for n in range(count))
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines))
    values = tables(tmp_path, "m")

    def counts(every=1, limit=2, **sft):
        config = parse_sft_config({**values, "sft": {**values["sft"], **sft}, "eval": {"every": every, "limit": limit}})
        data = load_data(config, tokenizer, [EOS])
        shared = {tuple(e.input_ids) for e in data.examples} & {tuple(e.input_ids) for e in data.held_out}
        assert not shared
        return len(data.examples), len(data.held_out)

    folder = str(tmp_path / "data")
    assert counts() == (4, 2) and counts(every=None) == (6, 0) and counts(path=folder, eval_split="dev") == (4, 2)
    assert counts(path=folder, eval_split="dev", limit=None) == (4, 3) and counts(limit=1) == (5, 1)
    for message, wrong in (
        ("all 6", {"limit": 6}),
        ("one file", {"eval_split": "dev"}),
        ("every row", {"limit": None}),
    ):
        with pytest.raises(UserError, match=message):
            counts(**wrong)


def test_several_processes_and_a_full_disk_are_a_sentence(tmp_path, monkeypatch, capsys):
    config = str(write_config(tmp_path / "c.toml", tables(tmp_path, "m")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([config]) == 2 and "uses one GPU; start it without torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run"))

    monkeypatch.setattr("grpo.sft.__main__.train", full)
    assert main([config]) == 2
    assert "No space left on device; make room and continue with --resume" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.parametrize("reference", ["start", "base"])
def test_grpo_begins_at_the_supervised_adapter_and_is_held_to_it_or_to_the_base(reference, warm, tmp_path):
    """At the first step the policy is the starting adapter: its KL to it is 0, to the base it is not."""
    from grpo.train import main as train

    grpo = run_tables(warm, lora={"init": str(warm / "sft" / "adapter")}, loss={"beta": 0.1, "reference": reference})
    grpo["train"]["max_steps"] = 1
    grpo["checkpoint"]["output_dir"] = str(tmp_path / "grpo")
    assert train([str(write_config(tmp_path / "grpo.toml", grpo))]) == 0
    (step,) = read_metrics(tmp_path / "grpo")
    assert step["kl"] < 1e-6 if reference == "start" else step["kl"] > 1e-3
    assert step["mismatch_kl"] < 1e-3, "vLLM samples with the adapter too"


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The tiny chat model, reward functions, and in `sft` a supervised run that moved the adapter."""
    folder = tmp_path_factory.mktemp("warm")
    save_tiny_chat_model(folder / "model")
    save_rewards(folder)
    rows_file(folder, [{"prompt": f"{n} + 1?", "completion": f"{n + 1}"} for n in range(8)])
    supervised = tables(folder, folder / "model", chat=False)
    supervised["train"] = {"learning_rate": 3e-2, "max_steps": 4}
    supervised["checkpoint"]["output_dir"] = str(folder / "sft")
    assert main([str(write_config(folder / "sft.toml", supervised))]) == 0
    return folder


def test_a_supervised_run_is_evaluated_on_a_task_that_is_named(tmp_path, model, capsys):
    from grpo.evaluate import configuration, parser
    from grpo.evaluate import main as evaluate

    (tmp_path / "config.toml").write_text(sft_config_toml(parse_sft_config(tables(tmp_path, model))))
    assert evaluate([str(tmp_path)]) == 2 and "--task" in capsys.readouterr().err
    config = configuration(parser().parse_args([str(tmp_path), "--task", "arithmetic"]), tmp_path)
    assert config.task[0].name == "arithmetic" and config.lora.r == 4


def test_the_recipes_rewritten_solutions_earn_every_reward():
    recipe = runpy.run_path(str(ROOT / "benchmarks/sft_then_grpo.py"))
    solution = "She sold 48/2 = <<48/2=24>>24 clips in May.\nThat is 48+24 = <<48+24=72>>72 in all.\n#### 72"
    text = recipe["rewritten"](solution, 1)
    reasoning = "She sold 48/2 = 24 clips in May. That is 48+24 = 72 in all."
    assert text == f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n72\n</answer>\n"
    completions, answers = [[{"role": "assistant", "content": text}]], ["72"]
    prompts = [[{"role": "user", "content": "?"}]]
    scores = [
        function(prompts=prompts, completions=completions, answer=answers, multiline=True)[0]
        for function in (correctness, integer, strict_format, soft_format, xml_count)
    ]
    assert scores == [2.0, 0.5, 0.5, 0.5, 0.5]
