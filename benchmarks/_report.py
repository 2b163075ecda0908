"""What every benchmark does with its figures: say where they were measured, print them, keep them under docs/."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks"


def describe_machine(*libraries: str) -> dict[str, Any]:
    """CPU, cores, memory, accelerator, versions and command of this run."""
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kb = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(memory_kb / 1e6, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


def format_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def check_bar(name: str, found: float, bar: float, unit: str = "", *, most: bool = True) -> str:
    """One line: what was asked for, what was found, and whether that holds.

    Args:
        name: What was measured.
        found: The figure.
        bar: What it is held against.
        unit: Of both, with its space.
        most: Whether the bar is the most that it may be; else the least.
    """
    holds = found <= bar if most else found >= bar
    asked = f"{'at most' if most else 'at least'} {bar:g}{unit}"
    return f"{'holds' if holds else 'DOES NOT HOLD'}: {name}: {found:.4g}{unit} ({asked})"


def keep(name: str, result: dict[str, Any], table: str, bars: Sequence[str] = ()) -> None:
    """Print a result and how it stands against its bars, and write it under docs/benchmarks as JSON and Markdown."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['accelerator'] or 'no GPU'}, {machine['date']}"
    text = f"`{machine['command']}`: {where}\n\n{table}\n" + (
        "\n" + "".join(f"* {bar}\n" for bar in bars) if bars else ""
    )
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
