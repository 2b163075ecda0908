"""Videos to tokens: data set readers, decoding in children, the frozen backbone, and the pipeline that joins them."""

from __future__ import annotations

__all__: list[str] = []
