"""The on-disk format: layout, codec, manifest, writer, reader. The only code that knows Zarr."""

from __future__ import annotations

__all__: list[str] = []
