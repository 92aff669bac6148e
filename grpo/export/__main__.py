"""The command `python -m grpo.export`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo.command import command
from grpo.errors import UserError
from grpo.export.build import EXPORT_FORMATS, GGUF_TYPES, export
from grpo.run.library_logs import quiet_libraries


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    done = "published" if parsed.push else "exported"
    return command("grpo.export", lambda: run(parsed), interrupted=lambda: f"interrupted; nothing was {done}")


def run(parsed: argparse.Namespace) -> None:
    """Export, or publish, as the command line says. Raises UserError."""
    quiet_libraries(parsed.verbose)
    if parsed.push is not None:
        publish(parsed)
        return
    for option, given in (("--public", parsed.public), ("--base-id", parsed.base_id), ("--dry-run", parsed.dry_run)):
        if given:
            raise UserError(f"{option} says how to publish; add --push OWNER/NAME, or leave it out")
    if parsed.to is None:
        raise UserError(f"--to is missing; name the format to write, one of {', '.join(EXPORT_FORMATS)}")
    export(
        parsed.source,
        parsed.to,
        parsed.out,
        parsed.base,
        checkpoint=parsed.checkpoint,
        gguf_type=parsed.gguf_type,
        llama_quantize=parsed.llama_quantize,
        check=parsed.check,
    )


def publish(parsed: argparse.Namespace) -> None:
    """Push, or print the card of what would be pushed. Raises UserError."""
    from grpo.export.push import Push, dry_run, push

    to = Push(parsed.push, parsed.to or "adapter", parsed.gguf_type, parsed.public, parsed.base_id)
    if parsed.dry_run:
        print(dry_run(parsed.source, to, parsed.base, checkpoint=parsed.checkpoint))
        return
    push(
        parsed.source,
        to,
        parsed.base,
        out=parsed.out,
        checkpoint=parsed.checkpoint,
        llama_quantize=parsed.llama_quantize,
        check=parsed.check,
    )


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.export`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.export",
        description="Write a trained adapter alone, merged into its base, or as GGUF, or publish it on the hub.",
        epilog="What loads each format, and how it was checked: docs/export.md.",
        allow_abbrev=False,
    )
    result.add_argument("source", metavar="RUN|ADAPTER", help="a run folder, or the folder of a peft adapter")
    result.add_argument("--to", choices=EXPORT_FORMATS, help="the format to write (with --push: adapter by default)")
    result.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the folder to make (default: exports/FORMAT in the run)"
    )
    result.add_argument("--base", metavar="PATH", help="the base, where it has moved, or its 16-bit original")
    result.add_argument("--checkpoint", metavar="step-N|best", help="this adapter of the run, instead of its final one")
    result.add_argument("--gguf-type", choices=GGUF_TYPES, default="f16", help="what a GGUF file's weights are kept in")
    result.add_argument("--llama-quantize", type=Path, metavar="FILE", help="llama.cpp's quantiser, for q4_k_m")
    result.add_argument("--push", metavar="OWNER/NAME", help="publish it in this repository on the hub, with a card")
    result.add_argument("--public", action="store_true", help="with --push: for everyone to see, instead of private")
    result.add_argument("--base-id", metavar="OWNER/NAME", help="with --push: what the base is called on the hub")
    result.add_argument("--dry-run", action="store_true", help="with --push: print the card; send nothing")
    result.add_argument("--no-check", dest="check", action="store_false", help="do not compare with base + adapter")
    result.add_argument("--verbose", action="store_true", help="let transformers write its logs")
    return result


if __name__ == "__main__":
    sys.exit(main())
