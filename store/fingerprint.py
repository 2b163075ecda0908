"""What a shard's file holds, told by the checksums inside it: no token is read for that."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from .layout import ArraySpec
from .names import open_file

_ABSENT = 2**64 - 1
_CHECKSUM_BYTES = 4


def fingerprint_shard(path: Path, spec: ArraySpec) -> str:
    """A hash over the lengths and checksums of all chunks of a shard, in their order.

    Two files with other tokens have other fingerprints; where in the file its chunks lie makes no difference.

    Args:
        path: One file of the array.
        spec: Of the array.

    Returns:
        32 hexadecimal digits.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it ends before its index does, or its index points outside of it.
    """
    handle = open_file(path)
    try:
        size = os.fstat(handle).st_size
        if spec.chunk_shape is None:
            return _digest(os.pread(handle, _CHECKSUM_BYTES, max(0, size - _CHECKSUM_BYTES)), size)
        num_chunks = spec.chunks_per_shard
        index_bytes = 16 * num_chunks
        data = os.pread(handle, index_bytes, size - index_bytes - _CHECKSUM_BYTES) if size > index_bytes else b""
        if len(data) != index_bytes:
            raise ValueError(f"{path.name} is shorter than its index")
        index = np.frombuffer(data, dtype="<u8").reshape(num_chunks, 2)
        checksums = bytearray()
        for offset, length in index.tolist():
            if offset == _ABSENT:
                checksums += b"none"
                continue
            if length < _CHECKSUM_BYTES or offset + length > size:
                raise ValueError(f"the index of {path.name} points outside of it")
            checksums += os.pread(handle, _CHECKSUM_BYTES, offset + length - _CHECKSUM_BYTES)
        return _digest(bytes(checksums), index[:, 1].tobytes())
    finally:
        os.close(handle)


def _digest(checksums: bytes, lengths: bytes | int) -> str:
    rest = lengths if isinstance(lengths, bytes) else str(lengths).encode()
    return hashlib.sha256(checksums + rest).hexdigest()[:32]
