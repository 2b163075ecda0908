"""`s4v extract`."""

from __future__ import annotations

from typing import Any

import typer

from ..extract.config import ExtractConfig
from ..extract.datasets import default_paths
from ..progress import show_progress
from ..terminal import print_lines
from ._extraction import SPELLINGS, Purpose, take_purpose
from ._options import Options, takes_options
from .front import EXIT_ENVIRONMENT, EXIT_STRICT, LOADING, Json, Strict, run_command, say


@takes_options(ExtractConfig, spellings=SPELLINGS)
def extract(options: Options, purpose: Purpose = None, strict: Strict = False, as_json: Json = False) -> None:
    """Run the backbone once over all videos and write their tokens to a store; run again to continue.

    A public data set's recipe (s4v datasets NAME) goes before the defaults of --frames, --sampling, --clips, --resize
    and --views.
    """
    with run_command("extract", as_json) as result:
        values = options.parse()
        values["root"], values["out"] = default_paths(values["dataset"], values["root"], values["out"])
        # Cheap checks are done; what follows imports torch.
        with show_progress("extract", LOADING) as report:
            if needed := take_purpose(purpose, options, values):
                say(f"s4v extract: {needed}")
            config = ExtractConfig(**values)
            from ..extract.extraction import extract_dataset

            summary = extract_dataset(config, report, lambda line: say(f"s4v extract: {line}"))
        result.update(store=str(summary.store), videos=summary.videos, files=summary.files, failed=summary.failed)
        result.update(pending_reasons=summary.pending_reasons, changed=summary.changed)
        if not as_json:
            print_lines(*_render(summary))
        if summary.pending:
            say(
                f"s4v extract: {len(summary.pending)} rows are pending with a reason: the same command tries them again"
            )
    if summary.pending:
        raise typer.Exit(EXIT_ENVIRONMENT)
    if strict and (summary.failed or summary.changed):
        raise typer.Exit(EXIT_STRICT)


def _render(summary: Any) -> list[str]:
    from ..store.info import describe_rows, render_reasons

    elsewhere = f"s4v info {summary.store}"
    lines = [
        f"{summary.store}: {describe_rows(summary.videos, summary.files)}",
        *render_reasons(summary.failed, elsewhere),
    ]
    if summary.pending:
        lines += ["pending, for the machine failed and not the video:", *render_reasons(summary.pending, elsewhere)]
    return lines
