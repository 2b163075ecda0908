"""What all commands share: exit codes, `--json`, how an error is told, and options that several of them have."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..device import is_first_process
from ..errors import S4vError
from ..terminal import print_lines

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 3 when a video failed.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Checkpoint = Annotated[
    str | None, typer.Option(help="Of the run: best (chosen on the validation split) or last. [best]")
]

EXIT_STRICT = 3
EXIT_DAMAGE = 4
EXIT_ENVIRONMENT = 5
EXIT_INTERRUPTED = 130

LOADING = "loading the libraries"
"""The first stage that a command reports, before it imports what takes seconds."""

_HINTS = {
    "extract": "; finished shards are kept, the same command continues",
    "train": "; the same command with --resume continues",
    "sweep": "; the same command continues",
    "compare": "; the same command continues",
}
"""What follows after Ctrl-C."""


@contextmanager
def run_command(name: str, as_json: bool) -> Iterator[dict[str, Any]]:
    """Run a command's body; turn its outcome into output and an exit code.

    Args:
        name: The command's.
        as_json: Whether to print one JSON object at the end: what the body puts into the dict that it is given.

    Raises:
        typer.Exit: If the body fails, with the error's exit code; the message is on stderr.
    """
    start = time.perf_counter()
    result: dict[str, Any] = {}
    try:
        yield result
    except S4vError as error:
        _fail(name, as_json, error, type(error).__name__, error.exit_code)
    except KeyboardInterrupt:
        _fail(name, as_json, f"interrupted{_HINTS.get(name, '')}", "Interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`head`, say) has what it wanted: nothing to tell, and nowhere to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        # What the file system says of a path the user named: full, read-only, no folder, name too long.
        is_machine = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
        where = f": {error.filename}" if error.filename else ""
        code = EXIT_ENVIRONMENT if is_machine else S4vError.exit_code
        _fail(name, as_json, f"{error.strerror or error}{where}. Nothing finished is lost.", "OSError", code)
    if as_json:
        seconds = round(time.perf_counter() - start, 3)
        print_lines(json.dumps({"command": name, "ok": True, **result, "seconds": seconds}))


def _fail(name: str, as_json: bool, message: object, kind: str, code: int) -> None:
    say(f"s4v {name}: {message}")
    if as_json:
        print_lines(json.dumps({"command": name, "ok": False, "error": {"type": kind, "message": str(message)}}))
    raise typer.Exit(code)


def hush_all_but_first() -> bool:
    """Whether this process speaks: of several under `torchrun` the first does, and the log of the others is off."""
    is_first = is_first_process()
    if not is_first:
        logging.getLogger("s4v").setLevel(logging.ERROR)
    return is_first


def say(*messages: str) -> None:
    """Print lines to stderr."""
    print_lines(*messages, to=sys.stderr)
