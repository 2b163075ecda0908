"""Whether a store fits on its disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import ConfigError
from ..files import describe_bytes
from ..store.layout import StoreLayout


def require_space(layout: StoreLayout, frames: int, out: Path, *, text_bytes: int = 0, replaces: bool = False) -> None:
    """Refuse an extraction whose store cannot fit.

    Args:
        layout: Of the store.
        frames: Cached frames that are still to be written, of all rows and views.
        out: The store.
        text_bytes: Of texts that are still to be written.
        replaces: Whether what stands there makes room first.

    Raises:
        ConfigError: With what is needed and what is free.
    """
    needed = frames * sum(layout.bytes_per_frame.values()) + text_bytes
    free, old = free_bytes(out), used_bytes(out) if replaces else 0
    # Compressed patches need less, nobody knows how much.
    if layout.keep_bits is None and needed > free + old:
        there = f" and {describe_bytes(old)} in the store that would be replaced" if old else ""
        kept = "Nothing was changed" if replaces else "What is finished is kept"
        raise ConfigError(
            f"{out} needs {describe_bytes(needed)} more and its disk has {describe_bytes(free)} free{there}. {kept}. "
            "Take fewer --layers, --channels or --frames, another --out, or a part of the work (--limit)."
        )


def used_bytes(path: Path) -> int:
    """Of all files below a folder; 0 where there is none."""
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def free_bytes(path: Path) -> int:
    """Of the disk that a file would be on; its folders need not exist."""
    existing = next(parent for parent in [path, *path.absolute().parents] if os.path.lexists(parent))
    return shutil.disk_usage(existing).free
