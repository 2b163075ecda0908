from typing import Any

ABI: int
MISSING: int
CUT_SHORT: int
MISMATCH: int
NO_MEMORY: int
CRC32C_KIND: str

def read_chunks(arrays: tuple[tuple[Any, ...], ...], num_threads: int) -> list[tuple[int, int, int]]: ...
def crc32c(data: Any) -> int: ...
def crc32c_by_table(data: Any) -> int: ...
