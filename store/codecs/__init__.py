"""How tokens are coded: one file a codec, and its line in this table."""

from __future__ import annotations

from .affine import AffineCodec
from .contract import Codec

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (AffineCodec,)}
"""By the name that a store records; one that records none has `DEFAULT_CODEC`."""
