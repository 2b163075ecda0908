"""Cached tokens to a trained side network: the network, the recipe, the loop, evaluation. No backbone, no video."""

from __future__ import annotations

__all__: list[str] = []
