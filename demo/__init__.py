"""The demonstration: generated videos through the whole pipeline, and a report on what came out."""

from __future__ import annotations

__all__: list[str] = []
