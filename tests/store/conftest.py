"""The two ways of reading chunks: what is true of one is true of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from s4v.store import _chunk_reads


def choose_reader(patch: pytest.MonkeyPatch, kind: str) -> str:
    """Read by the native module or by Python; skips where there is no native one."""
    native, told = _chunk_reads.find_native()
    if kind == "native" and native is None:
        pytest.skip(told)
    if kind == "Python":
        patch.setattr(_chunk_reads, "find_native", lambda: (None, "Python (asked for by a test)"))
    return kind


@pytest.fixture
def read_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Choose a reader for one test."""
    return lambda kind: choose_reader(monkeypatch, kind)


@pytest.fixture(scope="module", params=["native", pytest.param("Python", marks=pytest.mark.slow)])
def each_reader(request: pytest.FixtureRequest) -> Iterator[str]:
    """All tests of a module by one reader; among the slow ones by the other too. test_chunk_reads.py always has both.

    Where there is no native module Python reads in place of it.
    """
    with pytest.MonkeyPatch.context() as patch:
        kind = "Python" if _chunk_reads.find_native()[0] is None else request.param
        yield choose_reader(patch, kind)
