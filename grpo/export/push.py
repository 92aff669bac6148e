"""Push an export to a repository on the Hugging Face hub, with a model card made from the run.

    python -m grpo.export runs/gsm8k --push OWNER/NAME
    python -m grpo.export runs/gsm8k --push OWNER/NAME --to gguf --gguf-type q8_0
    python -m grpo.export runs/gsm8k --push OWNER/NAME --dry-run

All files arrive in one commit, which the hub makes whole or not at all; what it lists afterwards is compared with what
was sent, and only then is it called done. The repository is made private unless it is asked otherwise. The token is
huggingface_hub's affair (HF_TOKEN, or `hf auth login`), and is written nowhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.export.build import base_model, default_folder, export, find_adapter, run_of, trained_system_prompt
from grpo.export.card import PICTURE, CardFacts, card, draw_curves, is_hub_id, public_path, run_data
from grpo.model.adapter_config import ADAPTER_CONFIG
from grpo.model.locate import local_path
from grpo.run.model_reference import ModelReference

CARD = "README.md"
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx")
OF_THE_HUB = (".gitattributes", ".gitignore")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Push:
    """What is to be pushed, and where."""

    repository: str
    """OWNER/NAME."""
    form: str = "adapter"
    gguf_type: str = "f16"
    public: bool = False
    base_id: str | None = None
    """What the base is called on the hub, where it was read from a path of this machine."""


def push(
    source: str | Path,
    to: Push,
    base: str | Path | None = None,
    *,
    out: str | Path | None = None,
    checkpoint: str | None = None,
    llama_quantize: str | Path | None = None,
    check: bool = True,
    notice: Callable[[str], None] = print,
) -> str:
    """Export `source` as `grpo.export.build.export` does, publish it, and return its address.

    `out` keeps the exported folder; without it the files are gone from this machine afterwards. Raises UserError, with
    nothing published, for whatever cannot be exported or sent.
    """
    reference = described(source, to, base, checkpoint)
    hub = Hub(to)
    hub.prepare(notice)
    parent = default_folder(reference, to.form, checkpoint).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".push-", dir=parent) as scratch:
        target = Path(out).expanduser() if out is not None else Path(scratch) / "export"
        export(
            source, to.form, target, base, checkpoint=checkpoint, gguf_type=to.gguf_type,
            llama_quantize=llama_quantize, check=check, notice=notice,
        )  # fmt: skip
        added = Path(scratch) / "added"
        added.mkdir()
        write_card(reference, to, added, notice)
        if to.form == "adapter":
            name_base(target, reference, to, added)
        files = {file.name: file for folder in (target, added) for file in sorted(folder.iterdir()) if file.is_file()}
        hub.send(files)
    address = f"{hub.endpoint}/{to.repository}"
    notice(f"published {address}: {len(files)} files in one commit, {hub.visibility}; the hub lists them as sent")
    return address


def dry_run(source: str | Path, to: Push, base: str | Path | None = None, *, checkpoint: str | None = None) -> str:
    """The card, and above it what would be sent; nothing is exported, and the network is not asked."""
    reference = described(source, to, base, checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        text = write_card(reference, to, Path(folder), lambda sentence: None)
        picture = (Path(folder) / PICTURE).is_file()
    kind = f"gguf, {to.gguf_type}" if to.form == "gguf" else to.form
    files = ", ".join([f"the files of the export ({kind})", CARD, *([PICTURE] if picture else [])])
    seen = "public" if to.public else "private"
    return f"Would publish to {to.repository} ({seen}): {files}. {CARD}:\n\n{text}"


def described(source: str | Path, to: Push, base: str | Path | None, checkpoint: str | None) -> ModelReference:
    """The adapter that is meant. Raises UserError for names that are none, before anything is asked of the hub."""
    for option, name in (("--push", to.repository), ("--base-id", to.base_id)):
        if name is not None and (not is_hub_id(name) or ".." in name or "--" in name or len(name) > 96):
            raise UserError(f"{option} {name}: no name of a repository on the hub; write OWNER/NAME")
    return find_adapter(Path(source).expanduser(), checkpoint, base)


def write_card(reference: ModelReference, to: Push, folder: Path, notice: Callable[[str], None]) -> str:
    """Write the card and its picture into `folder`; returns the card's text."""
    run_folder = run_of(reference)
    run = run_data(run_folder)
    drawn = run is not None and draw_curves(run, folder / PICTURE, notice)
    facts = CardFacts(
        to.repository,
        to.form,
        base_name(reference, to),
        base_model(reference).revision,
        run,
        reference.lora,
        None if run_folder is None else trained_system_prompt(run_folder),
        to.gguf_type,
        drawn,
    )
    text = card(facts)
    (folder / CARD).write_text(text, encoding="utf-8")
    if not is_hub_id(facts.base):
        notice(
            f"the base is {facts.base}, a file or folder that others do not have; --base-id OWNER/NAME says what it is "
            "called on the hub"
        )
    return text


def base_name(reference: ModelReference, to: Push) -> str:
    """What others know the base by: its hub id, or the last name of its path."""
    name = base_model(reference).name
    if to.base_id is not None:
        return to.base_id
    return name if name.startswith("package:") or local_path(name) is None else public_path(str(Path(name).absolute()))


def name_base(exported: Path, reference: ModelReference, to: Push, added: Path) -> None:
    """Write the adapter's configuration with the base's public name, which is no path of this machine."""
    values = json.loads((exported / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = base_name(reference, to)
    (added / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# The hub


class Hub:
    """The repository that is pushed to."""

    def __init__(self, to: Push):
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
        self.to, self.api = to, HfApi(library_name="grpo")
        self.endpoint = str(self.api.endpoint)
        self.parent: str | None = None
        self.there: set[str] = set()
        self.created = False

    @property
    def visibility(self) -> str:
        return "public" if self.to.public else "private"

    def prepare(self, notice: Callable[[str], None]) -> None:
        """Look at the repository, or make it: whether one may write is known before minutes are spent."""
        with self.errors("nothing was published"):
            user = self.api.whoami()
        role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise UserError(f"the hub's token may only read; {LOGIN}")
        with self.errors("nothing was published"):
            if self.api.repo_exists(self.to.repository):
                self.look(self.api.model_info(self.to.repository))
            else:
                self.api.create_repo(self.to.repository, private=not self.to.public, exist_ok=False)
                self.created = True
                notice(f"made the {self.visibility} repository {self.to.repository}")

    def look(self, info: Any) -> None:
        """Raise UserError where the repository is seen by others than asked for."""
        if bool(info.private) == self.to.public:
            is_now = "private" if info.private else "public"
            remedy = "leave out --public" if self.to.public else "add --public"
            raise UserError(
                f"{self.to.repository} exists and is {is_now}; {remedy}, or change that on its page on the hub"
            )
        self.parent = info.sha if re.fullmatch(r"[0-9a-f]{40}", str(info.sha)) else None
        self.there = {file.rfilename for file in info.siblings or ()}

    def send(self, files: dict[str, Path]) -> None:
        """Upload `files` (name in the repository -> file) in one commit, and see that the hub has them."""
        from huggingface_hub import CommitOperationAdd

        self.check_strangers(files)
        operations = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        left = f"nothing was published{', and the repository is empty' if self.created else ''}"
        with self.errors(left):
            commit = self.api.create_commit(
                self.to.repository, operations, commit_message="Trained with grpo", parent_commit=self.parent
            )
        with self.errors("the commit was made, but what it holds could not be read back"):
            info = self.api.model_info(self.to.repository, revision=commit.oid, files_metadata=True)
        self.verify(files, {file.rfilename: file for file in info.siblings or ()})

    def check_strangers(self, files: dict[str, Path]) -> None:
        """Raise UserError where weights of another model would stay beside ours."""
        strangers = sorted(name for name in self.there - files.keys() if name.endswith(WEIGHTS))
        if strangers:
            raise UserError(
                f"{self.to.repository} already holds {strangers[0]}, which this push does not replace, so that two "
                "models would lie in one repository; push to another name, or remove it there; nothing was published"
            )

    def verify(self, files: dict[str, Path], listed: dict[str, Any]) -> None:
        """Raise UserError unless the hub lists every file with its size, and of large ones its SHA-256."""
        for name, file in files.items():
            entry = listed.get(name)
            size = None if entry is None else entry.size
            expected = None if entry is None or entry.lfs is None else entry.lfs.sha256
            same = size == file.stat().st_size and (expected is None or expected == sha256(file))
            if not same:
                has = "does not list it" if entry is None else f"lists {size} bytes of it"
                raise UserError(
                    f"{self.to.repository}: {name} was sent with {file.stat().st_size} bytes, and the hub {has}; the "
                    "repository is not whole, so push again"
                )

    @contextmanager
    def errors(self, state: str) -> Iterator[None]:
        """Turn what the hub, the network and huggingface_hub raise into a sentence that ends with `state`."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:  # every way in which a network and a service fail
            raise UserError(f"{self.to.repository}: {self.reason(error)}; {state}") from None

    def reason(self, error: Exception) -> str:
        """Why, and what to do, without the token."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import LocalTokenNotFoundError

        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status == 401:
            return f"the hub does not know you; {LOGIN}"
        if status == 403:
            return f"the hub does not let you write there; push to a name of your own, or {LOGIN}"
        if status in (409, 412):
            return "the repository was changed meanwhile; push again"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        token = get_token()
        text = text.replace(token, "(token)") if token else text
        return f"the hub cannot be used ({text[:300]}); push again once that is mended"


def sha256(file: Path) -> str:
    """Of a file's bytes, a megabyte at a time."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
