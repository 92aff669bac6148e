"""The Python API, for notebooks and scripts: load a model once; ask it, train it and save it as often as you like.

    policy = grpo.load("Qwen/Qwen2.5-3B-Instruct", max_seq_length=1024)
    policy.generate([{"role": "user", "content": "What is 21 + 14?"}])
    result = policy.train("arithmetic", rewards=[my_function], max_steps=30)
    policy.save_lora("adapter")
    policy.close()

Loading builds the training graph, an ordinary peft model, and does not start vLLM; the first generation does. For what
a setting means see `grpo.config`: every name of the TOML is a keyword here.
"""

from __future__ import annotations

import datetime
import difflib
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grpo.api.arguments import as_folder, check_export, check_sampling
from grpo.api.inputs import as_environment, as_own_or_task, as_rewards, reward_table
from grpo.api.keywords import SECTIONS, Tables, merged, tables_of, with_lengths
from grpo.api.prompts import Prompts, as_batch, pieces, token_ids
from grpo.api.result import TrainResult
from grpo.config.familiar_names import ATTRIBUTES, NotHere, adapter_table, ours
from grpo.config.schema import Config, Lora, config_toml, parse_config
from grpo.data import Data, load_data
from grpo.distributed.launch import refuse_several
from grpo.errors import UserError
from grpo.model.vocabulary import check_tokens
from grpo.monitor.run_log import RunLog
from grpo.rollout.types import Request, SamplingSettings
from grpo.run.checkpoint import CONFIG, open_run
from grpo.run.library_logs import quiet_libraries
from grpo.run.model_reference import resolve_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from grpo.environments.pool import EnvironmentPool
    from grpo.session import Session

LOAD_ARGUMENTS = ("load_in_4bit", "load_in_8bit", "full_finetuning", "max_seq_length", "lora", "base", "verbose")
GENERATION_ARGUMENTS = ("temperature", "max_tokens", "top_p", "n", "seed", "adapter", "stream")
GENERATED_AT_ONCE = 64
"""Sequences that vLLM decodes at once unless training needs more: the KV cache has room for all at full length."""
NO_TASK = {"task": {"name": "none"}}
"""Stands where a configuration names a task, while there is none."""
GENERATION = -3
"""In place of the step in the seeds of completions, as `grpo.evaluate` has its own numbers there."""


def load(
    model: str | Path | None = None,
    *,
    load_in_4bit: bool | None = None,
    load_in_8bit: bool | None = None,
    full_finetuning: bool = False,
    max_seq_length: int | None = None,
    lora: Lora | Mapping[str, Any] | LoraConfig | None = None,
    base: str | Path | None = None,
    verbose: bool = False,
    **settings: Any,
) -> LoadedPolicy:
    """Load a base model with a LoRA adapter, ready to generate and to train.

    Args:
        model: whatever `model.name` may be: a folder, a hub id, a `.gguf` file, "package:NAME/FILE". Or the folder of
            a run or of an adapter, whose base is then loaded with the adapter's values.
        load_in_4bit: hold the base as NF4; a run's own choice, else True.
        load_in_8bit: hold it in 8 bit instead, as int8 or as an 8-bit checkpoint has it.
        full_finetuning: train all weights, held in 16 or 32 bit, instead of an adapter.
        max_seq_length: longest prompt plus completion in tokens. Default: that of training, 1,024.
        lora: the adapter's shape, as `grpo.config.schema.Lora`, a dict of `[lora]` keys or peft's LoraConfig; not for
            an adapter or a run.
        base: where the base of the adapter or run is now, if it has moved.
        verbose: let vLLM and transformers write their logs.
        settings: further names of `[model]`, `[rollout]`, `[train]` and so on. They hold for this policy's
            generation and are the defaults of its training. Unsloth's names are taken where they mean the same.

    Raises UserError for a model, an adapter or a setting that cannot be used.
    """
    refuse_several("grpo.load")
    if full_finetuning:
        settings["full_finetuning"] = True
        load_in_4bit = False if load_in_4bit is None else load_in_4bit
    storage = chosen_storage(load_in_4bit, load_in_8bit)
    chosen = {**storage, "max_seq_length": max_seq_length}
    given = {name: value for name, value in {"model": model, **chosen}.items() if value is not None}
    settings = ours({**given, **settings}, "grpo.load")
    model = settings.pop("model", None)
    if model is None or isinstance(model, Mapping):
        raise UserError('grpo.load: which model? Write grpo.load("Qwen/Qwen2.5-3B-Instruct"), a folder or a .gguf file')
    if not isinstance(model, str | Path):
        raise UserError(f"grpo.load: model = {model!r} must be the text of a name, or a path")
    chosen = {name: settings.pop(name, None) for name in chosen}
    tables = merged(
        {} if lora is None else {"lora": lora.model_dump() if isinstance(lora, Lora) else adapter_table(lora)},
        tables_of(settings, "grpo.load", SECTIONS, LOAD_ARGUMENTS),
        {"model": {key: value for key, value in chosen.items() if value is not None}},
    )
    return open_policy(model, tables, base=base, verbose=verbose, status=print)


def open_policy(
    model: str | Path,
    tables: Tables,
    *,
    base: str | Path | None = None,
    verbose: bool = False,
    status: Callable[[str], None],
    at_most: int | None = None,
    source: str = "grpo.load",
    overrides: Sequence[str] = (),
) -> LoadedPolicy:
    """`load`, with settings as tables of a configuration, and telling `status` what is being done.

    `at_most`: let sequences be so long, or as long as the model takes them. `source` and `overrides` are where
    `tables` came from, for errors.
    """
    reference = resolve_model(model, base)
    if "lora" in tables and reference.adapter is not None:
        raise UserError(f"{model}: the adapter brings its own shape; leave lora out")
    sections = ("model", "lora", "rollout")
    tables = merged({name: table for name, table in reference.tables.items() if name in sections}, tables)
    first = merged({"rollout": {"max_num_seqs": GENERATED_AT_ONCE}}, tables, NO_TASK)
    config = parse_config(with_lengths(first), source, overrides=overrides)
    quiet_libraries(verbose)
    from grpo.session import open_session, read_model

    files = read_model(config, status)
    if at_most is not None:
        longest = getattr(files.source.config.get_text_config(), "max_position_embeddings", at_most)
        longest = max(min(longest, at_most), config.max_seq_length)
        config = parse_config(with_lengths(merged(first, {"model": {"max_seq_length": longest}})), source)
    session = open_session(config, adapter=reference.adapter, status=status, start_engine=False, files=files)
    return LoadedPolicy(session, tables)


def chosen_storage(load_in_4bit: bool | None, load_in_8bit: bool | None) -> dict[str, bool | None]:
    """Both keys for one that is true, so that it replaces what a run had chosen. Raises UserError for two."""
    if load_in_4bit and load_in_8bit:
        raise UserError("grpo.load: load_in_4bit and load_in_8bit are both true; pass one of the two")
    if load_in_8bit:
        return {"load_in_4bit": False, "load_in_8bit": True}
    if load_in_4bit:
        return {"load_in_4bit": True, "load_in_8bit": False}
    return {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}


def generation_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as arguments of `LoadedPolicy.generate`. Raises UserError for what it has none for."""
    arguments = ours(settings, "policy.generate")
    for name in arguments:
        if name not in GENERATION_ARGUMENTS:
            near = difflib.get_close_matches(name, GENERATION_ARGUMENTS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(GENERATION_ARGUMENTS)}"
            raise UserError(f"policy.generate: there is no argument {name!r}; {hint}")
    return arguments


class LoadedPolicy:
    """A model with its adapter, made by `grpo.load`. A context manager: leaving it frees the memory."""

    def __init__(self, session: Session, tables: Tables):
        """`tables`: the sections that every later configuration of this policy has in common."""
        self._session: Session | None = session
        self._tables = tables
        self._first_config = session.config
        self._run: Path | None = None
        """Of the last training."""
        self._calls = 0
        self._stream: Iterator[list[int]] | None = None

    def __getattr__(self, name: str) -> Any:
        """Only of what a policy has not: methods of other libraries' models, each with what to write instead."""
        if name in ATTRIBUTES:
            raise NotHere(f"a policy has no {name!r}: {ATTRIBUTES[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __iter__(self) -> Iterator[Any]:
        raise UserError("grpo.load gives one policy: write policy = grpo.load(...); its tokenizer is policy.tokenizer")

    @property
    def session(self) -> Session:
        """The parts that hold the model. Raises UserError after `close`."""
        if self._session is None:
            raise UserError("this policy is closed; load it again with grpo.load")
        return self._session

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.session.config

    @property
    def model(self) -> PeftModel:
        """The training graph as a peft model, whose base is shared with vLLM and frozen; with `full_finetuning` as
        transformers' model, whose weights are."""
        return self.session.policy.model

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        return self.session.tokenizer

    def start(self) -> None:
        """Start vLLM now rather than at the first generation."""
        _ = self.session.engine

    def generate(
        self,
        prompts: Prompts,
        *,
        temperature: float = 0.0,
        max_tokens: int = 256,
        top_p: float = 1.0,
        n: int = 1,
        seed: int | None = None,
        adapter: bool = True,
        stream: bool = False,
        images: Any = None,
        **settings: Any,
    ) -> Any:
        """Sample completions with vLLM, which the first call starts.

        Args:
            prompts: a text, which is continued as it stands; a chat, a list of messages with "role" and "content",
                which goes through the chat template; or a list of these. A model with `images = true` is shown those
                in parts {"type": "image", "image": ...} of a content: PIL images, paths, bytes of files.
            temperature: 0 takes the likeliest token each time; at most 2.
            max_tokens: where a completion is cut.
            n: completions of each prompt.
            seed: the same seed gives the same completions. Default: another one every call.
            adapter: False asks the base.
            stream: return an iterator over the text in pieces, for one prompt. Another call ends it.
            images: an image or a list of them, beside one chat whose messages do not have them already.
            settings: the same by names that other libraries have for it, such as `max_new_tokens`.

        Returns the text; a list of `n` texts for `n` above 1; for a list of prompts a list of these, in its order.
        Raises UserError for settings out of range and for what does not fit `max_seq_length`.
        """
        from grpo.rollout.sampler import sample_seed

        if settings:
            chosen = dict(
                zip(GENERATION_ARGUMENTS, (temperature, max_tokens, top_p, n, seed, adapter, stream), strict=True)
            )
            return self.generate(prompts, images=images, **chosen | generation_arguments(settings))
        batch, single = as_batch(prompts, images, self.config.model.max_pixels)
        if stream and (len(batch) > 1 or n > 1):
            raise UserError("stream=True takes one prompt and n=1; leave stream out, or call once for each prompt")
        if not adapter and self.config.model.full_finetuning:
            raise UserError(
                "adapter=False: all weights of this model are trained, so there is no base beside it; load that by name"
            )
        check_sampling(temperature, max_tokens, top_p, n, seed)
        session = self.session
        template = session.config.rollout.chat_template_kwargs
        ids = token_ids(batch, session.tokenizer, template, session.image_tokens)
        numbered = ((f"prompt {number}", prompt) for number, prompt in enumerate(ids, 1))
        check_tokens(numbered, session.tokenizer, session.base.config)
        sampling = self._ready(max(map(len, ids)), temperature, max_tokens, top_p, adapter)
        self._calls += 1
        parts = (self._calls,) if seed is None else (0, seed)
        requests = [
            Request(
                index * n + member, prompt, sample_seed(GENERATION, *parts, index, member), images=batch[index].images
            )
            for index, prompt in enumerate(ids)
            for member in range(n)
        ]
        if stream:
            self._stream = session.engine.stream(requests[0], sampling, adapter=adapter)
            return pieces(self._stream, session.decode)
        texts = [""] * len(requests)
        for done in session.engine.generate(requests, sampling, adapter=adapter):
            texts[done.request_id] = session.decode(done.token_ids)
        completions = texts if n == 1 else [texts[start : start + n] for start in range(0, len(texts), n)]
        return completions[0] if single else completions

    def _ready(
        self, longest_prompt: int, temperature: float, max_tokens: int, top_p: float, adapter: bool
    ) -> SamplingSettings:
        """Make vLLM ready for such a call: started, large enough, idle, and with the adapter as it is now."""
        session, needed = self.session, longest_prompt + max_tokens
        limit = max(self._first_config.max_seq_length, session.config.max_seq_length)
        if needed > limit:
            raise UserError(
                f"the longest prompt has {longest_prompt} tokens, which with max_tokens = {max_tokens} exceeds "
                f"max_seq_length = {limit}; lower max_tokens, or load with a larger max_seq_length"
            )
        self._end_stream()
        now = session.engine.settings.max_seq_length if session.engine_started else session.config.max_seq_length
        if now < needed:
            session.configure(self._first_config)
        if adapter and session.engine_started:
            session.engine.sync_adapter()
        return session.sampling(temperature, max_tokens, top_p)

    def _end_stream(self) -> None:
        """Abort a completion that was not read to its end."""
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]
            self._stream = None

    def train(self, task: Any = None, rewards: Any = None, *, verbose: bool = False, **settings: Any) -> TrainResult:
        """Train the adapter from where it is, with GRPO; the optimiser starts afresh at every call.

        Args:
            task: the name of a task, a `grpo.Task`, a `[task]` table, a list of rows (dicts with a "prompt" and the
                columns that the rewards take), or a `datasets.Dataset` of such rows.
            rewards: functions, names of functions, or `[[rewards]]` tables, in which "function" may be a function.
                Default: the task's own. Each runs in a process of its own; closures and lambdas are sent there.
            verbose: print a line a step instead of a live display.
            settings: names of `[rollout]`, `[loss]`, `[train]`, `[log]`, `[checkpoint]` such as `max_steps=30`,
                `learning_rate=1e-4` or `output_dir="runs/mine"`, and whole sections: `eval={"every": 10}`,
                `alarms={"length_collapse": 0.1}`,
                `environment={"tools": [search]}` with functions or classes themselves or their names. TRL's names are
                taken where they mean the same, and `args=GRPOConfig(...)`.

        The record is in the run folder, by default a new one below `runs/`, as on the command line. Raises UserError
        for a setting, task or reward that cannot be used.
        """
        session = self.session
        given = {name: value for name, value in {"task": task, "rewards": rewards}.items() if value is not None}
        settings = ours({**given, **settings}, "policy.train")
        task, rewards = settings.pop("task", None), settings.pop("rewards", None)
        if task is None:
            raise UserError("policy.train: on what? Write policy.train(rows, rewards=[...]), or the name of a task")
        sent = None
        if (table := settings.pop("environment", None)) is not None:
            settings["environment"], sent = as_environment(table)
        loaded, task_table = as_own_or_task(task)
        specs = as_rewards(rewards) if rewards is not None else []
        config = self._training_config(task_table, [reward_table(spec) for spec in specs], settings)
        from grpo.training.environment import check_conversation, own_questions, own_rewards, start_environment

        check_conversation(config, session.tokenizer, session.stop_token_ids, session.image_tokens)
        with start_environment(config, status=session.status, sent=sent) as environment:
            loaded = loaded or own_questions(environment)
            if not (specs or loaded.rewards or own_rewards(config, environment)):
                raise UserError(
                    f"task {loaded.name!r} suggests no rewards; pass rewards=[...] with at least one function"
                )
            data = load_data(config, session.tokenizer, tasks=[loaded], image_tokens=session.image_tokens)
            check_tokens(data.texts(), session.tokenizer, session.base.config)
            data.rewards = specs or data.rewards
            return self._trained(config, data, environment, verbose=verbose)

    def _trained(
        self, config: Config, data: Data, environment: EnvironmentPool | None, *, verbose: bool
    ) -> TrainResult:
        """A run of `config` on `data`, with its record."""
        session = self.session
        self._end_stream()
        with open_run(config) as run:
            log = RunLog(run.path, config, max_steps=config.train.max_steps or 0, verbose=verbose)
            previous_status, session.status = session.status, log.status
            try:
                with log:
                    from grpo.training.run import train_session

                    session.configure(config)
                    if session.engine_started:
                        session.engine.sync_adapter()
                    train_session(session, data, run.path, log, environment=environment)
                self._run = run.path
            finally:
                session.status = previous_status
        return TrainResult.read(run.path)

    def _training_config(self, task: Tables, rewards: list[Tables], settings: Mapping[str, Any]) -> Config:
        """The configuration of one run. Raises UserError for a setting that is unknown or out of range."""
        arguments = ("task", "rewards", "verbose")
        sections = tuple(name for name in SECTIONS if name != "model") + ("eval", "environment", "alarms")
        tables = merged(
            {"checkpoint": {"output_dir": str(unused_folder(task["name"]))}},
            self._tables,
            tables_of(settings, "policy.train", sections, arguments),
            {"task": task, "rewards": rewards},
        )
        return parse_config(with_lengths(tables), "policy.train")

    def save_lora(self, folder: str | Path) -> Path:
        """Write the adapter to `folder` in peft's format and return the folder. Raises UserError where it cannot be."""
        path = as_folder(folder, "policy.save_lora")
        try:
            self.session.policy.save_adapter(path)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"policy.save_lora: {path} cannot be written ({reason}); name another folder") from None
        return path

    def load_lora(self, folder: str | Path) -> None:
        """Replace the adapter's values by those in `folder`. Raises UserError unless its shape is the same."""
        self.session.policy.load_adapter(as_folder(folder, "policy.load_lora"))

    def save_merged(
        self, folder: str | Path, to: str = "merged-16bit", *, base: str | Path | None = None, **options: Any
    ) -> Path:
        """Write base and adapter as one model to the new folder `folder`, and return it.

        `to`, `base` (the 16-bit original of a 4-bit base, say) and `options` are those of `grpo.export.build.export`.
        The system prompt in a Modelfile is that of the last training's questions.
        """
        from grpo.export.build import export, trained_system_prompt

        path = as_folder(folder, "policy.save_merged")
        check_export(to, options, inspect.signature(export))
        if self._run is not None:
            options.setdefault("system", trained_system_prompt(self._run))
        say = options.pop("notice", print)
        with tempfile.TemporaryDirectory(prefix="grpo-merged-") as scratch:
            run = Path(scratch) / path.name
            trained = self.session.policy
            adapter = run / trained.artefact
            adapter.mkdir(parents=True)
            trained.save(adapter)
            (run / CONFIG).write_text(config_toml(self.config), encoding="utf-8")
            options["notice"] = lambda text: say(text.replace(str(adapter), f"the {trained.artefact}"))
            return export(run, to=to, out=path, base=base, **options)

    def close(self) -> None:
        """Stop vLLM and give all memory back. May be called twice."""
        if self._session is not None:
            self._end_stream()
            self._session.close()
            self._session = None

    def __enter__(self) -> LoadedPolicy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._session is None:
            return "<closed policy>"
        base, full = self._session.base, self.config.model.full_finetuning
        trained = "all weights trained" if full else f"LoRA of rank {self.config.lora.r}"
        return f"<{self.config.model.name} in {base.stored_as} on {base.device.type}, {trained}>"


def unused_folder(task: str) -> Path:
    """A run folder that does not exist, named after the task and the time."""
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in Path(task.split(":")[0]).stem)
    stem = f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder, number = Path("runs") / stem, 2
    while folder.exists():
        folder, number = Path("runs") / f"{stem}-{number}", number + 1
    return folder
