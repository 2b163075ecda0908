"""Text to videos: embed a query with the frozen text tower, rank a store's videos."""

from __future__ import annotations

__all__: list[str] = []
