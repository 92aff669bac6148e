"""The configuration: every field refuses what it cannot mean, in a sentence that names the place and the remedy."""

from __future__ import annotations

import math
import runpy
import tomllib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from grpo.config.messages import admits_none_as_text, section_of
from grpo.config.schema import Config, config_toml, parse_config, read_config
from grpo.config.toml import line_of, split_override, write_toml
from grpo.errors import UserError
from grpo.sft.config import read_sft_config
from tests.helpers.paths import ROOT

MINIMAL = '[model]\nname = "m"\n[task]\nname = "t"\n'

OF_EACH_TYPE = {
    "boolean": True,
    "integer": 7,
    "float": 0.5,
    "string": "nonsense",
    "list": [[0.5]],
    "table": {"nonsense": 1},
}
FIELDS = {
    f"{section}.{key}": field
    for section, holder in Config.model_fields.items()
    for key, field in section_of(holder).model_fields.items()
}


def minimal() -> dict[str, dict[str, Any]]:
    return {"model": {"name": "m"}, "task": {"name": "t"}, "rewards": {"function": "f"}}


def with_value(name: str, value: Any) -> dict[str, Any]:
    """The minimal configuration with one field set."""
    section, key = name.split(".")
    values: dict[str, Any] = minimal()
    values.setdefault(section, {})[key] = value
    values["rewards"] = [values["rewards"]]
    return values


def error_of(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(values, "file.toml")
    return str(caught.value)


def toml_types(annotation: Any) -> set[str]:
    """The types in TOML that a field's annotation admits. Text admitted by a Literal is not just any text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return toml_types(arguments[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(toml_types, arguments))
    if origin is Literal or annotation is type(None):
        return set()
    if origin in (list, tuple, dict):
        return {"table"} if origin is dict else set()  # the list in the table above fits no field
    return {bool: {"boolean"}, int: {"integer"}, float: {"integer", "float"}, str: {"string"}, Path: {"string"}}[
        annotation
    ]


def limits(field: FieldInfo) -> list[Any]:
    """The limits on a number, wherever in the annotation they stand."""
    found = list(field.metadata)
    for part in get_args(field.annotation):
        for extra in get_args(part)[1:] if get_origin(part) is Annotated else ():
            found += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    return found


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_the_wrong_type_is_refused_with_what_is_accepted(name: str) -> None:
    fitting = toml_types(FIELDS[name].annotation)
    for kind, value in OF_EACH_TYPE.items():
        if kind not in fitting:
            error = error_of(with_value(name, value))
            assert error.startswith(("file.toml: " + name, "file.toml: rewards.0." + name.split(".")[1])), error
            assert ": must be " in error and "\n" not in error


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if limits(field)])
def test_a_number_out_of_range_is_refused(name: str) -> None:
    whole = "integer" in toml_types(FIELDS[name].annotation) and "float" not in toml_types(FIELDS[name].annotation)
    tiny = 1 if whole else 1e-9
    bad: list[float] = [] if whole else [math.nan, math.inf]
    for limit in limits(FIELDS[name]):
        match limit:
            case annotated_types.Gt(bound):
                bad += [bound, bound - tiny]
            case annotated_types.Ge(bound):
                bad.append(bound - tiny)
            case annotated_types.Lt(bound):
                bad += [bound, bound + tiny]
            case annotated_types.Le(bound):
                bad.append(bound + tiny)
    for value in bad:
        assert ": must be " in error_of(with_value(name, value)), value


NUMBERS = [name for name, field in FIELDS.items() if {"integer", "float"} & toml_types(field.annotation)]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_nothing_computes_with_is_refused(name: str) -> None:
    whole = "float" not in toml_types(FIELDS[name].annotation)
    for value in (2**63, 10**30) if whole else (1e39, 1.7e308, -1e300, 10**39):
        error = error_of(with_value(name, value))
        assert f"{name.split('.')[1]} = {value}: must be " in error and "\n" not in error


def test_so_is_one_within_a_table_but_not_among_options_of_others() -> None:
    assert "lora.alpha_pattern = { q_proj = 1e+39 }: must be a number" in error_of(
        with_value("lora.alpha_pattern", {"q_proj": 1e39})
    )
    assert parse_config(with_value("task.options", {"any": 1e300}), "file.toml")


@pytest.mark.parametrize("name", FIELDS)
def test_a_misspelt_key_is_answered_with_the_nearest_one(name: str) -> None:
    key = name.split(".")[1]
    assert f"did you mean {key!r}?" in error_of(with_value(name + "x", 1))


@pytest.mark.parametrize("section", Config.model_fields)
def test_a_misspelt_section_is_answered_with_the_nearest_one(section: str) -> None:
    values: dict[str, Any] = {**minimal(), section + "s": {}}
    values["rewards"] = [values["rewards"]]
    assert f"did you mean {section!r}?" in error_of(values)


SENTENCES = [
    ("", "file.toml: 'model' is missing; it has no default (and 1 more problem)"),
    ('[modle]\nname = "m"\n', "file.toml:1: unknown key 'modle'; did you mean 'model'? (and 2 more problems)"),
    ("model = 3\n", "file.toml:1: model = 3: must be a table (and 1 more problem)"),
    ("[model]\n[task]\nname = 't'\n", "file.toml: 'model.name' is missing; it has no default"),
    (
        MINIMAL + "[rollout]\nlearning_rate = 1\n",
        "file.toml:6: unknown key 'rollout.learning_rate'; it belongs in [train]",
    ),
    (MINIMAL + "max_steps = 4\n", "file.toml:5: unknown key 'task.max_steps'; it belongs in [train]"),
    (
        MINIMAL + "[train]\nvllm_gpu_memory_utilization = 0.5\n",
        "file.toml:6: unknown key 'train.vllm_gpu_memory_utilization'; here it is 'gpu_memory_utilization' of",
    ),
    (MINIMAL + "[train]\noptim = 'sgd'\n", 'file.toml:6: train.optim = "sgd": must be "adamw", "adamw_8bit" or "paged'),
    (
        MINIMAL + "[train]\ngradient_checkpointing = 1\n",
        'file.toml:6: train.gradient_checkpointing = 1: must be true, false, "auto", "none", "mlp", "layer" or',
    ),
    (
        MINIMAL + "[rollout]\nnum_generations = 1\n",
        "file.toml:6: rollout.num_generations = 1: must be an integer of at least 2",
    ),
    (MINIMAL + "[lora]\nr = 0\n", "file.toml:6: lora.r = 0: must be an integer from 1 to 512"),
    (
        MINIMAL + "[lora]\ntarget_modules = ['q_proj', 3]\n",
        'file.toml:6: lora.target_modules = ["q_proj", 3]: must be a list that is not empty, each text in quotes',
    ),
    (
        MINIMAL + "pass_rate = [0.5]\n",
        "file.toml:5: task.pass_rate = [0.5]: must be a list of 2, each a number from 0 to 1",
    ),
    (
        MINIMAL + "[[rewards]]\nfunction = 'a'\n[[rewards]]\nfunction = 'b'\nweight = '2'\n",
        'file.toml:9: rewards.1.weight = "2": must be a number',
    ),
    (
        MINIMAL + "[rewards]\nfunction = 'a'\n",
        'file.toml:5: rewards = { function = "a" }: must be one or more tables',
    ),
    (
        MINIMAL + "[[rewards]]\nfunction = 'x.py:f'\n[[rewards]]\nfunction = 'f'\n",
        "file.toml: two rewards are called 'f'; give one of them a different `name`",
    ),
    (MINIMAL + "[model]\n", "file.toml: not valid TOML: Cannot declare ('model',) twice (at line 5, column 7)"),
    (MINIMAL + "[train\n", "file.toml: not valid TOML: Expected ']' at the end of a table declaration (at line 5"),
    (
        MINIMAL + "[rollout]\ngpu_memory_utilization = 0.5\nkv_cache_memory_bytes = 1\n",
        "file.toml:5: [rollout] gpu_memory_utilization and kv_cache_memory_bytes are both set; keep one of them",
    ),
    (MINIMAL + "[model.x]\n", "file.toml:5: unknown key 'model.x'; valid keys are name, load_in_4bit,"),
    (MINIMAL + "[rollout]\ntop_p = 0.9\n", "file.toml:5: [rollout] top_p < 1, top_k > 0 and min_p > 0 are refused"),
    (MINIMAL + "[lora]\nuse_dora = true\n", "file.toml:5: [lora] use_dora is not supported"),
    (MINIMAL + "[lora]\ninit_lora_weights = 'eva'\n", "file.toml:5: [lora] init_lora_weights = 'eva' is not supp"),
    (MINIMAL + "[lora]\ninit_lora_weights = false\n", "file.toml:5: [lora] init_lora_weights = False is not supp"),
    (MINIMAL + "[lora]\nloftq_iter = 2\n", "file.toml:5: [lora] loftq_iter has no use without init_lora_weights"),
    (
        "[model]\nname = 'm'\nload_in_4bit = true\nload_in_8bit = true\n[task]\nname = 't'\n",
        "file.toml:1: [model] load_in_4bit and load_in_8bit are both true",
    ),
    (
        "[model]\nname='m'\nmax_seq_length=9\n[task]\nname='t'\n",
        "file.toml: model.max_seq_length = 9 is below rollout.max",
    ),
    (MINIMAL + "[eval]\npass_at = [8]\n", "file.toml:5: [eval] pass_at = [8] needs num_generations of at least 8"),
    (
        MINIMAL + "[loss]\nimportance_sampling_clip_min = 3\n",
        "file.toml:5: [loss] importance_sampling_clip_min must be be",
    ),
    (
        MINIMAL + "[loss]\nloss_type = 'cispo'\nepsilon_high = 0.2\n",
        "file.toml:5: [loss] epsilon_high = 0.2 is below 1",
    ),
    (
        MINIMAL + "[train]\noptimizer_steps_per_rollout = 17\n",
        "file.toml: train.optimizer_steps_per_rollout = 17 exceeds",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), SENTENCES, ids=[sentence[:60] for _, sentence in SENTENCES])
def test_bad_input_gives_this_sentence(
    text: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_config("file.toml")
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.toml: no such configuration file"):
        read_config(tmp_path / "nowhere.toml")
    with pytest.raises(UserError, match="is a folder"):
        read_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.toml: cannot be read as text"):
        read_config(tmp_path / "binary.toml")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.toml"
    path.write_text(MINIMAL + "[[rewards]]\nfunction = 'a'\n[[rewards]]\nfunction = 'b'\n")
    return path


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.max_steps=7", lambda config: config.train.max_steps == 7),
        ("train.learning_rate=1e-5", lambda config: config.train.learning_rate == 1e-5),
        ("train.learning_rate = 2", lambda config: config.train.learning_rate == 2.0),
        ("model.name=some/model", lambda config: config.model.name == "some/model"),
        ('model.name="3"', lambda config: config.model.name == "3"),
        ("model.name=a=b", lambda config: config.model.name == "a=b"),
        ("model.load_in_4bit=false", lambda config: config.model.load_in_4bit is False),
        ("checkpoint.output_dir=runs/x", lambda config: config.checkpoint.output_dir == Path("runs/x")),
        ("checkpoint.save_total_limit=none", lambda config: config.checkpoint.save_total_limit is None),
        ("eval.every=none", lambda config: config.eval.every is None),
        ("lora.target_modules=['q_proj']", lambda config: config.lora.target_modules == ["q_proj"]),
        ("rewards.1.weight=2", lambda config: [reward.weight for reward in config.rewards] == [1, 2]),
        ("rewards.weight=2", lambda config: [reward.weight for reward in config.rewards] == [2, 1]),
        ("rewards=[]", lambda config: config.rewards == []),
        ("task.weight=3", lambda config: config.task[0].weight == 3),
        ("task.options.path=data/x", lambda config: config.task[0].options == {"path": "data/x"}),
        ("task.pass_rate=[0.1, 0.9]", lambda config: config.task[0].pass_rate == (0.1, 0.9)),
    ],
)
def test_set_overrides_the_file(file: Path, override: str, value: Any) -> None:
    assert value(read_config(file, [override]))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.max_steps", "--set train.max_steps: write it as section.key=value"),
        ("train..x=1", "--set train..x=1: write it as section.key=value"),
        ("=1", "--set =1: write it as section.key=value"),
        ("max_steps=1", "--set max_steps=1: unknown key 'max_steps'; it belongs in [train]"),
        ("model.name.x=1", "--set model.name.x=1: 'name' is a value, not a section"),
        ("rewards.2.weight=1", "--set rewards.2.weight=1: there is no entry 2 in a list of 2"),
        ("lora.target_modules.0=q", "--set lora.target_modules.0=q: the file has no 'target_modules' whose entry"),
        ("train.max_steps=ten", '--set train.max_steps=ten: train.max_steps = "ten": must be an integer of at least 1'),
        ("train.max_steps=", '--set train.max_steps=: train.max_steps = "": must be an integer'),
        ("model.name=3", "--set model.name=3: model.name = 3: must be text in quotes"),
        ("modle.name=x", "--set modle.name=x: unknown key 'modle'; did you mean 'model'?"),
        ("train.max_setps=3", "--set train.max_setps=3: unknown key 'train.max_setps'; did you mean 'max_steps'?"),
        ("rewards.1.wieght=3", "--set rewards.1.wieght=3: unknown key 'rewards.1.wieght'; did you mean 'weight'?"),
        ("model=x", '--set model=x: model = "x": must be a table'),
    ],
)
def test_a_bad_override_is_named_instead_of_the_file(file: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(file, [override])
    assert str(caught.value).startswith(sentence)


@given(st.text(), st.text())
def test_no_override_ends_in_a_traceback(key: str, value: str) -> None:
    values = minimal()
    values["rewards"] = [values["rewards"]]  # type: ignore[assignment]
    try:
        parts, _ = split_override(f"{key}={value}")
    except UserError:
        return
    assert parts


@given(st.sampled_from(sorted(FIELDS)), st.text(max_size=12), st.sampled_from(["", ".0", ".x", ".0.x"]))
def test_no_field_overridden_with_any_text_ends_in_a_traceback(name: str, value: str, suffix: str) -> None:
    path = ROOT / "tests" / "data" / "minimal.toml"
    try:
        read_config(path, [f"{name}{suffix}={value}"])
    except UserError as error:
        assert "must be" in str(error) or "--set" in str(error) or "unknown key" in str(error)


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = parse_config(
        {
            "model": {
                "name": 'a "b"\n\\',
                "chat_template": "t.jinja",
                "keep_16bit": ["x", "y"],
                "max_seq_length": 4096,
            },
            "task": [
                {"name": "t", "options": {"a b": [1, {"c": True}], "d": 1e300, "e": {}}, "pass_rate": [0.1, 1.0]},
                {"name": "u", "system_prompt": "\ttab \x7f \x1b é 漢\r\n", "weight": 1e-7},
            ],
            "rewards": [{"function": "f", "weight": -1.5}, {"function": "g.h:k", "options": {"x": "none"}}],
            "eval": {"limit": "none", "every": 5},
            "checkpoint": {"save_total_limit": "none"},
        }
    )
    path = tmp_path / "config.toml"
    path.write_text(config_toml(config))
    assert read_config(path) == config
    assert config.eval.limit is None


TOML_VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), TOML_VALUES, max_size=4))
def test_what_the_writer_writes_the_standard_reader_reads(table: dict[str, Any]) -> None:
    assert tomllib.loads(write_toml({"x": table, "y": [table, table]})) == {"x": table, "y": [table, table]}


def test_none_stands_for_no_value_only_where_it_cannot_be_meant_as_text() -> None:
    admitting = {name for name, field in FIELDS.items() if admits_none_as_text(field)}
    assert admitting >= {"eval.every", "eval.limit", "checkpoint.save_total_limit", "train.max_steps"}
    assert not admitting & {"lora.init", "model.revision", "model.chat_template", "loss.function", "train.seed"}


def test_the_line_of_a_key_is_found_past_comments_strings_and_repeated_tables() -> None:
    text = '# a\n[x]\ny = """\nz = 1\n"""\nz = 2\n[[r]]\nk = 1\n[[r]]  # c\n"k" = 2\nm.n = 3\n'
    assert line_of(text, ("x", "z")) == 6
    assert line_of(text, ("r", 0, "k")) == 8
    assert line_of(text, ("r", 1, "k")) == 10
    assert line_of(text, ("r", 1, "m", "n")) == 11
    assert line_of(text, ("x", "nowhere")) is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.toml")), ids=lambda path: path.name)
def test_every_configuration_in_configs_is_valid(path: Path) -> None:
    read_sft_config(path) if path.stem == "sft" else read_config(path)


@pytest.mark.parametrize(("written", "meant"), [(True, "layer"), (False, "none"), ("offload", "offload")])
def test_gradient_checkpointing_may_be_a_boolean_as_in_trl(written: bool | str, meant: str) -> None:
    assert parse_config(with_value("train.gradient_checkpointing", written)).train.gradient_checkpointing == meant


def test_the_configuration_reference_is_up_to_date() -> None:
    reference = runpy.run_path(str(ROOT / "docs/make_config.py"))["reference"]
    assert (ROOT / "docs/config.md").read_text() == reference(), "run `make docs`"


@pytest.mark.parametrize(
    "override",
    ["rollout.top_k=1", "rollout.min_p=0.1", "model.max_seq_length=8", "train.optimizer_steps_per_rollout=999"],
)
def test_a_rule_between_keys_that_an_override_breaks_names_it_and_not_the_file(override: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(ROOT / "tests" / "data" / "minimal.toml", ["log.samples=1", override, "train.seed=1"])
    assert str(caught.value).startswith(f"--set {override}: ")
