"""One file a command: options from a config, one call, print. A function's docstring is its command's help."""

from __future__ import annotations

__all__: list[str] = []
