"""An exported model computes what base + adapter do, loads where people load it, and is there whole or not at all.

Expected logits are peft's own, of its layers on transformers' model; GGUF has tests of its own.
"""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.export import hf_folder as folder_export
from grpo.export.__main__ import main
from grpo.export.bnb_format import packed_entries
from grpo.export.build import export
from grpo.export.compare import Distance, streamed_logits
from grpo.export.merge import MergedSource
from grpo.model.adapter_config import read_adapter_config
from grpo.model.fingerprint import Fingerprint
from grpo.model.source import open_source
from grpo.policy.adapter_files import AdapterFile
from grpo.run.model_reference import resolve_model
from tests.helpers.adapters import TOKENS, logits, train_nothing
from tests.helpers.checkpoints import edit_tensors, quantize_folder
from tests.helpers.families import save_family
from tests.helpers.tiny import FAMILIES, save_tiny

NAME = "model.layers.1.self_attn.q_proj.weight"


class Made:
    """A tiny base in `base`, an adapter on it in `adapter`, and the peft model of both."""

    def __init__(
        self, folder: Path, family: str = "llama", targets: Any = "all-linear", lora: Any = None, **changes: Any
    ):
        self.base, self.adapter, self.out = folder / "base", folder / "adapter", folder / "out"
        save = save_tiny if family in FAMILIES else save_family
        model = save(self.base, family, **changes)
        self.peft = train_nothing(model, self.adapter, self.base, targets, **(lora or {}))

    def export(self, to: str, **keys: Any) -> tuple[Path, list[str]]:
        """The export and what was said about it."""
        notices: list[str] = []
        return export(self.adapter, to, self.out, notice=notices.append, **keys), notices


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


# merged-16bit


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
def test_a_merged_model_has_the_logits_of_base_and_adapter(family: str, tmp_path: Path) -> None:
    """Untied, tied with biases, fused projections, norms around every block."""
    made = Made(tmp_path, family)
    folder, notices = made.export("merged-16bit")
    expected = logits(made.peft)
    apart = Distance.between(expected, logits(loaded(folder))).kl
    assert apart < 2e-3 and apart < Distance.between(expected, logits(made.peft.unload())).kl / 50
    assert notices[0].startswith("merging") and "dequantised" not in notices[0]
    assert "compared with base + adapter" in notices[1]


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_the_sum_is_rounded_once(rank_stabilised: bool, tmp_path: Path) -> None:
    """Against the sum in float64: half a unit in the last place of bfloat16, and no more."""
    made = Made(tmp_path, lora={"use_rslora": rank_stabilised})
    folder, _ = made.export("merged-16bit", check=False)
    base, adapter = load_file(made.base / "model.safetensors"), load_file(made.adapter / "adapter_model.safetensors")
    scale = 12 / (4**0.5 if rank_stabilised else 4)
    merged = load_file(folder / "model.safetensors")
    assert set(merged) == set(base)
    for name, weight in merged.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        exact = base[name].double()
        if f"{key}.lora_A.weight" in adapter:
            exact = exact + scale * adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.double(), exact, rtol=2**-8 * 1.002, atol=1e-7, msg=name)


def test_shards_hold_every_tensor_once_and_no_more_than_one_is_in_memory(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, alive, most = 100_000, [], 0
    plain = folder_export.rounded

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal most
        result = plain(*arguments)
        alive.append(weakref.ref(result))
        most = max(most, sum(tensor.nbytes for ref in alive if (tensor := ref()) is not None))
        return result

    monkeypatch.setattr(folder_export, "rounded", counted)
    source = MergedSource(open_source(Model(name=str(made.base))), AdapterFile(read_adapter_config(made.adapter)))
    (tmp_path / "shards").mkdir()
    folder_export.write_16bit(source, tmp_path / "shards", None, shard_bytes=limit)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    held = [name for file in files for name in load_file(file)]
    assert sorted(held) == sorted(source.names)
    assert most <= limit + 128 * 192 * 2
    assert Distance.between(logits(made.peft), logits(loaded(tmp_path / "shards"))).kl < 2e-3


def test_a_quantised_base_is_dequantised_and_that_is_said(tmp_path: Path) -> None:
    made = Made(tmp_path, "qwen2")
    plain = quantize_folder(made.base, nested=True)
    folder, notices = made.export("merged-16bit")
    assert "the dequantised NF4 weights" in notices[0] and "--base" in notices[0]
    a, b = AdapterFile(read_adapter_config(made.adapter)).factors(NAME.removesuffix(".weight"))
    expected = plain[NAME] + 3 * b @ a
    merged = load_file(folder / "model.safetensors")
    torch.testing.assert_close(merged[NAME].float(), expected, rtol=2**-8, atol=1e-5)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not any("absmax" in name for name in merged) and "lm_head.weight" not in merged


def test_the_original_is_taken_in_place_of_a_quantised_base(tmp_path: Path) -> None:
    made = Made(tmp_path)
    original = tmp_path / "original"
    save_tiny(original)
    quantize_folder(made.base, nested=False)
    folder, notices = made.export("merged-16bit", base=original)
    assert "dequantised" not in notices[0]
    assert Distance.between(logits(made.peft), logits(loaded(folder))).kl < 2e-3


def test_a_16_bit_base_keeps_its_type(made: Made) -> None:
    tensors = load_file(made.base / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, made.base / "model.safetensors")
    folder, _ = made.export("merged-16bit")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_what_float16_cannot_hold_is_refused(made: Made) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(made.base / "model.safetensors").items()}
    tensors[NAME].fill_(60000)
    save_file(tensors, made.base / "model.safetensors")
    adapter = load_file(made.adapter / "adapter_model.safetensors")
    save_file({name: tensor * 300 for name, tensor in adapter.items()}, made.adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"{NAME} has values that float16 cannot hold"):
        made.export("merged-16bit")


def test_tokenizer_and_settings_go_along(made: Made) -> None:
    files = {"tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": "old", "a": 1}',
             "generation_config.json": '{"eos_token_id": 7}', "chat_template.jinja": "old", "LICENSE": "x"}  # fmt: skip
    for name, content in files.items():
        (made.base / name).write_text(content)
    (made.base / "pytorch_model.bin").write_bytes(b"pickle")
    (made.base / "training_args.json").write_text("{}")
    folder, _ = made.export("merged-16bit", check=False)
    for name, content in files.items():
        assert (folder / name).read_text() == content
    assert not (folder / "pytorch_model.bin").exists() and not (folder / "training_args.json").exists()
    template = made.base.parent / "own.jinja"
    template.write_text("own")
    folder_export.replace_template(folder, template.read_text())
    assert (folder / "chat_template.jinja").read_text() == "own"
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"a": 1}


# merged-4bit


def test_4_bit_weights_are_those_of_bitsandbytes_bit_for_bit() -> None:
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(96, 320) * torch.rand(96, 1)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    entries = packed_entries("w", weight, torch.float32)
    expected = {"w": codes} | {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert set(entries) == set(expected)
    for name, entry in entries.items():
        if "quant_state" in name:
            assert json.loads(bytes(entry.tolist())) == json.loads(bytes(expected[name].tolist()))
        else:
            assert entry.dtype == expected[name].dtype and entry.equal(expected[name]), name


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_a_4_bit_model_loads_in_transformers_and_here_alike(family: str, tmp_path: Path) -> None:
    made = Made(tmp_path, family)
    folder, notices = made.export("merged-4bit")
    model = loaded(folder)
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    ours = streamed_logits(open_source(Model(name=str(folder))), TOKENS)
    # transformers from 5.24 on computes such a model in the type that it was quantised for, whatever is asked.
    assert Distance.between(logits(model), ours).kl < (2e-3 if model.dtype == torch.float32 else 5e-3)
    lost = float(notices[1].split("by ")[1].split("%")[0]) / 100
    adapter = AdapterFile(read_adapter_config(made.adapter))
    weight = MergedSource(open_source(Model(name=str(made.base))), adapter).read(f"{DOWN}.weight")
    one = ((dequantised(folder, f"{DOWN}.weight") - weight).norm() / weight.norm()).item()
    assert 0.06 < lost < 0.12 and abs(lost - one) < 0.01
    reported = float(notices[2].split("KL ")[1].split()[0])
    assert reported > 0.001 and "base without adapter" in notices[3]


DOWN = "model.layers.1.mlp.down_proj"


def dequantised(folder: Path, name: str) -> torch.Tensor:
    """bitsandbytes' own reading of a checkpoint entry."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors = load_file(folder / "model.safetensors")
    stats = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    state = QuantState.from_dict(stats, device=torch.device("cpu"))
    return dequantize_4bit(tensors[name], state).float()


@pytest.mark.parametrize("asked", ['["layers.1.mlp.down_proj"]', '"auto"'])
def test_layers_kept_in_16_bit_by_the_run_are_not_packed(asked: str, made: Made, tmp_path: Path) -> None:
    """Of "auto" the choice that was made then, which lies beside the adapter."""
    if asked == '"auto"':
        source = open_source(Model(name=str(made.base)))
        replace(Fingerprint.of(source), kept_16bit=[DOWN]).write(made.adapter)
    run = a_run(made, tmp_path, f'[model]\nname = "{{base}}"\nkeep_16bit = {asked}\n')
    folder = export(run, "merged-4bit", notice=lambda text: None)
    assert folder == run / "exports" / "merged-4bit"
    tensors = load_file(folder / "model.safetensors")
    assert tensors[f"{DOWN}.weight"].dtype == torch.bfloat16 and tensors[NAME].dtype == torch.uint8
    assert type(loaded(folder).model.layers[1].mlp.down_proj) is torch.nn.Linear


def test_a_choice_that_was_not_made_is_not_made_while_exporting(made: Made, tmp_path: Path) -> None:
    run = a_run(made, tmp_path, '[model]\nname = "{base}"\nload_in_4bit = false\nkeep_16bit = "auto"\n')
    with pytest.raises(UserError, match="records no decision; name the layers"):
        export(run, "merged-4bit", notice=lambda text: None)


# adapter


def test_an_adapter_loads_in_peft_and_in_transformers(made: Made) -> None:
    from peft import AutoPeftModelForCausalLM

    folder, notices = made.export("adapter")
    assert notices[0].startswith("14 layers")
    expected = logits(made.peft)
    peft_model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(peft_model), expected, atol=1e-4, rtol=1e-4)
    model = loaded(made.base)
    model.load_adapter(str(folder))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.vllm
@pytest.mark.slow
def test_an_adapter_is_served_by_vllm(made: Made) -> None:
    """Greedy tokens of vLLM with the adapter are those of peft, and not those of the base."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(name, "0" if "MULTI" in name else "1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folder, _ = made.export("adapter")
    engine = LLM(str(made.base), skip_tokenizer_init=True, enable_lora=True, max_lora_rank=8, dtype="float32",
                 enforce_eager=True, max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=1 << 24)  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
    prompt = TOKENS[0].tolist()
    answers = {}
    for label, request in {"base": None, "adapter": LoRARequest("exported", 1, str(folder))}.items():
        (answer,) = engine.generate([{"prompt_token_ids": prompt}], sampling, lora_request=request, use_tqdm=False)
        answers[label] = list(answer.outputs[0].token_ids)
    engine.llm_engine.engine_core.shutdown()
    assert answers["adapter"] == greedy(made.peft, prompt, 8)
    assert answers["base"] == greedy(made.peft.unload(), prompt, 8) != answers["adapter"]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The next `count` tokens that `model` finds most likely."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# Finding adapter and base


def a_run(made: Made, folder: Path, config: str) -> Path:
    """A run folder with the adapter as final one."""
    run = folder / "run"
    run.mkdir()
    (run / "config.toml").write_text(config.format(base=made.base))
    made.adapter.rename(run / "adapter")
    return run


def test_an_adapter_finds_its_base_after_it_moved(made: Made, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    made.base.rename(moved)
    with pytest.raises(UserError, match="its base has moved .*base") as caught:
        made.export("merged-16bit")
    assert "\n" not in str(caught.value)
    folder, _ = made.export("adapter", base=moved)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
    merged = export(folder, "merged-16bit", tmp_path / "merged", notice=lambda text: None)
    assert Distance.between(logits(made.peft), logits(loaded(merged))).kl < 2e-3


def test_a_revision_belongs_to_the_recorded_name(made: Made, tmp_path: Path) -> None:
    run = a_run(made, tmp_path, '[model]\nname = "{base}"\nrevision = "v2"\n')
    kept, moved = (
        export(run, "adapter", tmp_path / name, base, notice=str) for name, base in (("a", None), ("b", made.base))
    )
    revisions = [json.loads((folder / "adapter_config.json").read_text())["revision"] for folder in (kept, moved)]
    assert revisions == ["v2", None]
    assert resolve_model(kept).tables["model"] == {"name": str(made.base), "revision": "v2"}


@pytest.mark.parametrize("to", ["adapter", "merged-16bit"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 192}, r"lora_A.weight has shape \(4, 128\), on this base it has \(4, 192\)"),
        ({"num_hidden_layers": 1}, r"adapter_config.json: lora.target_modules names 'model.layers.1.*no linear"),
    ],
)
def test_another_base_is_refused(to: str, changes: dict[str, int], message: str, made: Made, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", **changes)
    with pytest.raises(UserError, match=f"{message}.*name the base that the adapter was trained on"):
        made.export(to, base=tmp_path / "other")
    assert not made.out.exists()


def test_a_checkpoint_of_a_run_can_be_named(made: Made, tmp_path: Path) -> None:
    run = a_run(made, tmp_path, '[model]\nname = "{base}"\n')
    older = run / "checkpoints" / "step-5" / "adapter"
    older.mkdir(parents=True)
    for file in (run / "adapter").glob("adapter_*"):
        (older / file.name).write_bytes(file.read_bytes())
    edit = load_file(older / "adapter_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in edit.items()}, older / "adapter_model.safetensors")
    folder = export(run, "merged-16bit", checkpoint="step-5", notice=lambda text: None)
    assert folder == run / "exports" / "merged-16bit-step-5"
    assert load_file(folder / "model.safetensors")[NAME].equal(
        load_file(made.base / "model.safetensors")[NAME].bfloat16()
    )
    for wrong in ("step-6", "best", "../../base"):
        with pytest.raises(UserError, match=f"no checkpoint '{wrong}'; there are step-5$"):
            export(run, "adapter", checkpoint=wrong)


# Bad input, and nothing half-written


def refusal(made: Made, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        made.export("merged-16bit", **keys)
    notices = str(caught.value)
    assert "\n" not in notices and not made.out.exists() and not list(made.out.parent.glob(".*"))
    return notices


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("alpha_pattern", {"q_proj": "3"}), ("init_lora_weights", "corda"), ("peft_type", "IA3"),
     ("lora_alpha", None)],
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused(key: str, value: Any, made: Made) -> None:
    file = made.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert str(file) in refusal(made)


@pytest.mark.parametrize(
    "name", ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.lora_embedding_A",
             "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"]
)  # fmt: skip
def test_weights_that_would_be_left_out_are_refused(name: str, made: Made) -> None:
    file = made.adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(4, 4)}, file)
    assert f"holds {name}, which is no A or B" in refusal(made)


def test_damaged_adapters_are_named(made: Made) -> None:
    file = made.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
    assert f"tensor {key} is missing" in refusal(made)
    save_file(tensors | {key: tensors[key][:2]}, file)
    assert f"{key} has shape (2, 128), on this base it has (4, 128)" in refusal(made)
    file.write_bytes(b"damaged")
    assert str(file) in refusal(made)
    file.rename(made.adapter / "adapter_model.bin")
    assert "pickled adapters are never loaded" in refusal(made)


def test_a_damaged_base_leaves_nothing_behind(made: Made) -> None:
    edit_tensors(made.base, model__layers__1__mlp__up_proj__weight=None)
    assert "model.layers.1.mlp.up_proj" in refusal(made)


def test_a_full_disk_leaves_nothing_behind(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **keys: Any) -> None:
        raise OSError(28, "No space left on device", "shard-0")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert "shard-0: No space left on device; nothing was exported" in refusal(made)


def test_a_wrong_export_is_never_left(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = folder_export.rounded
    swapped = NAME.replace("q_proj", "o_proj")
    monkeypatch.setattr(
        folder_export,
        "rounded",
        lambda tensor, dtype, name: plain(tensor.flip(0) if name == swapped else tensor, dtype, name),
    )
    assert "does not compute what base + adapter do" in refusal(made)


def test_what_exists_is_never_replaced(made: Made) -> None:
    made.out.mkdir()
    (made.out / "mine").write_text("mine")
    with pytest.raises(UserError, match="already exists; name another folder with --out"):
        made.export("merged-16bit")
    assert [file.name for file in made.out.iterdir()] == ["mine"]


def test_the_command_line_says_it_in_a_sentence(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(made.adapter), "--to", "adapter"]) == 0
    assert (made.adapter.parent / "adapter-adapter" / "adapter_config.json").is_file()
    assert main([str(made.base), "--to", "merged-16bit"]) == 2
    assert capsys.readouterr().err.startswith(f"grpo.export: {made.base}: neither a run nor the folder of an adapter")
    with pytest.raises(SystemExit) as caught:
        main([str(made.adapter), "--to", "onnx"])
    assert caught.value.code == 2
