"""Chunks in one call: both ways of reading give the same bytes and the same errors."""

import errno
import functools
import os
import shutil
import sysconfig
import types
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from s4v.store import _chunk_reads, _shard_file
from s4v.store._chunk_reads import ChunkReads, find_native, read_chunks
from s4v.store._shard_file import DamagedChunkError, ShardFile

CHUNK = 1000
NUM_CHUNKS = 12
ABSENT = 5


def data_of(number):
    return np.random.default_rng(number).integers(0, 256, CHUNK).astype(np.uint8)


def write_shard(path):
    """Chunks in the order of their numbers, one of them left out."""
    index, body = np.full((NUM_CHUNKS, 2), 2**64 - 1, np.uint64), b""
    for number in range(NUM_CHUNKS):
        if number != ABSENT:
            index[number] = len(body), CHUNK + 4
            data = data_of(number).tobytes()
            body += data + crc32c(data).to_bytes(4, "little")
    table = index.tobytes()
    path.write_bytes(body + table + crc32c(table).to_bytes(4, "little"))
    return path


@pytest.fixture
def shard(tmp_path):
    return ShardFile(write_shard(tmp_path / "c.0"), NUM_CHUNKS, row=0, chunk_bytes=CHUNK + 4)


@pytest.fixture(params=["native", "Python"])
def kind(request, read_by):
    return read_by(request.param)


def plan(shards, wanted, target, **where):
    """`wanted` are (shard, chunk) pairs."""
    files, numbers = (np.array(part, np.int64) for part in zip(*wanted, strict=True))
    return ChunkReads(tuple(shards), files, numbers, 100 + np.arange(len(wanted)), CHUNK, target, **where)


def read_one(shard, number):
    target = np.zeros(CHUNK, np.uint8)
    read_chunks([plan([shard], [(0, number)], target, offsets=np.array([0]))], num_threads=2)
    return target


def test_the_native_module_is_there_where_it_can_be_built():
    """An error of the compiler is as silent as a missing compiler."""
    has_header = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    if not shutil.which("cc") or not has_header or os.environ.get("S4V_NATIVE") == "0":
        pytest.skip("no C compiler, no Python.h, or S4V_NATIVE=0: Python reads")
    module, told = find_native()
    assert module is not None, told


@settings(max_examples=60, deadline=None)
@given(data=st.one_of(st.binary(max_size=100), st.integers(0, 20_000).map(lambda n: np.random.default_rng(n).bytes(n))))
def test_checksums_are_those_of_the_library_with_and_without_instructions_for_it(data):
    native, told = find_native()
    if native is None:
        pytest.skip(told)
    assert native.crc32c(data) == native.crc32c_by_table(data) == crc32c(data)


@settings(max_examples=40, deadline=None)
@given(
    wanted=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, NUM_CHUNKS - 1).filter(lambda n: n != ABSENT)),
        min_size=1,
        max_size=30,
    ),
    num_threads=st.integers(1, 9),
    data=st.data(),
)
def test_both_ways_put_the_same_bytes_where_they_are_wanted(tmp_path_factory, wanted, num_threads, data):
    folder = tmp_path_factory.mktemp("shards")
    shards = [ShardFile(write_shard(folder / name), NUM_CHUNKS, 0, None, CHUNK + 4) for name in ("a", "b")]
    order = np.array(data.draw(st.permutations(range(len(wanted)))))
    whole = np.zeros((len(wanted), CHUNK), np.uint8)
    lengths = np.array(data.draw(st.lists(st.integers(0, 40), min_size=len(wanted), max_size=len(wanted))))
    sources = np.array([data.draw(st.integers(0, CHUNK - 40)) for _ in wanted])
    parts = np.zeros(int(lengths.sum()), np.uint8)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    pieces = np.stack([sources, starts[:-1], lengths], axis=1)
    expected = np.stack([data_of(number) for _, number in wanted])
    for native in {find_native()[0], None}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_chunk_reads, "find_native", lambda found=native: (found, "this"))
            whole[:], parts[:] = 0, 0
            read_chunks(
                [
                    plan(shards, wanted, whole, offsets=order * CHUNK),
                    plan(shards, wanted, parts, firsts=np.arange(len(wanted) + 1), pieces=pieces),
                ],
                num_threads,
            )
        assert np.array_equal(whole[order], expected)
        cut = [row[source : source + size] for row, source, size in zip(expected, sources, lengths, strict=True)]
        assert np.array_equal(parts, np.concatenate(cut))


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.integers(0, NUM_CHUNKS - 1), min_size=1, max_size=40),
    is_sorted=st.booleans(),
    damaged=st.sets(st.integers(0, NUM_CHUNKS - 2), max_size=3),
    left=st.one_of(st.none(), st.integers(0, (NUM_CHUNKS - 1) * (CHUNK + 4))),
    num_threads=st.integers(1, 4),
)
def test_chunks_side_by_side_are_read_at_once_and_judged_one_by_one(
    tmp_path_factory, numbers, is_sorted, damaged, left, num_threads
):
    native, told = find_native()
    if native is None:
        pytest.skip(told)
    path = write_shard(tmp_path_factory.mktemp("runs") / "a")
    shard = ShardFile(path, NUM_CHUNKS, 0, None, CHUNK + 4)
    content = bytearray(path.read_bytes())
    for place in damaged:
        content[place * (CHUNK + 4) + 500] ^= 4
    path.write_bytes(content[:left])
    wanted = [(0, number) for number in (sorted(numbers) if is_sorted else numbers)]
    found = []
    for module in (native, None):
        target = np.zeros((len(wanted), CHUNK), np.uint8)
        reads = plan([shard], wanted, target, offsets=np.arange(len(wanted)) * CHUNK)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_chunk_reads, "find_native", lambda module=module: (module, "this"))
            problems = _chunk_reads._try_to_read([reads], num_threads)
        bad = {one.chunk for one in problems}
        assert all(np.array_equal(target[i], data_of(n)) for i, (_, n) in enumerate(wanted) if i not in bad)
        found.append(problems)
    assert sorted(found[0]) == sorted(found[1])


def test_a_chunk_that_is_missing_cut_short_or_damaged_is_named(kind, tmp_path, shard):
    with pytest.raises(DamagedChunkError, match=r"^chunk 5 of c\.0 is missing$") as caught:
        read_one(shard, ABSENT)
    assert caught.value.row == 100 and caught.value.place == 0
    file = tmp_path / "c.0"
    content = bytearray(file.read_bytes())
    content[3 * (CHUNK + 4) + 17] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedChunkError, match=r"^chunk 3 of c\.0 does not match its checksum$"):
        read_one(shard, 3)
    assert np.array_equal(read_one(shard, 4), data_of(4))
    os.truncate(file, CHUNK)  # while it is open, and its index known
    with pytest.raises(DamagedChunkError, match=r"^chunk 0 of c\.0 is cut short$"):
        read_one(shard, 0)


def test_what_the_system_says_is_told(kind, shard):
    descriptor, shard.descriptor = shard.descriptor, os.open("/", os.O_RDONLY)
    try:
        with pytest.raises(DamagedChunkError, match=r"^chunk 1 of c\.0: Is a directory$"):
            read_one(shard, 1)
    finally:
        os.close(shard.descriptor)
        shard.descriptor = descriptor


def test_the_first_bad_chunk_array_by_array_is_told(kind, shard):
    good, bad = np.zeros(CHUNK, np.uint8), np.zeros((3, CHUNK), np.uint8)
    reads = [
        plan([shard], [(0, 0)], good, offsets=np.array([0])),
        plan([shard], [(0, 1), (0, ABSENT), (0, ABSENT)], bad, offsets=np.arange(3) * CHUNK),
    ]
    with pytest.raises(DamagedChunkError) as caught:
        read_chunks(reads, num_threads=4)
    assert (caught.value.place, caught.value.row) == (1, 101)


def test_each_flipped_byte_is_refused(kind, tmp_path):
    path = write_shard(tmp_path / "c.0")
    content = path.read_bytes()
    shard = ShardFile(path, NUM_CHUNKS, 0, None, CHUNK + 4)
    rng = np.random.default_rng(0)
    with path.open("r+b") as file:
        for place in rng.integers(0, (NUM_CHUNKS - 1) * (CHUNK + 4), 1000).tolist():
            os.pwrite(file.fileno(), bytes([content[place] ^ int(rng.integers(1, 256))]), place)
            stored = place // (CHUNK + 4)
            with pytest.raises(DamagedChunkError, match="does not match its checksum"):
                read_one(shard, stored + (stored >= ABSENT))
            os.pwrite(file.fileno(), content[place : place + 1], place)
    assert np.array_equal(read_one(shard, 0), data_of(0))


class Disk:
    """Refuses the first reads of some chunks, as a disk on a network does that was away for a moment."""

    def __init__(self, monkeypatch, why, times, chunks=(1, 2)):
        self.waits, self.asked, self._read = [], [], _chunk_reads._try_to_read
        self._why, self._left, self._chunks = why, times, chunks
        monkeypatch.setattr(_chunk_reads, "_try_to_read", self.read)
        monkeypatch.setattr(_shard_file.time, "sleep", self.waits.append)

    def read(self, reads, num_threads):
        self.asked.append([len(one.numbers) for one in reads])
        if not self._left:
            return self._read(reads, num_threads)
        self._left -= 1
        given = [(place, chunk) for place, one in enumerate(reads) for chunk in range(len(one.numbers))]
        first = len(self.asked) == 1
        return [_chunk_reads._Problem(*one, self._why) for one in given if not first or one[1] in self._chunks]


def read_four(shard):
    target, parts = np.zeros((4, CHUNK), np.uint8), np.zeros((4, 10), np.uint8)
    pieces = np.stack([np.full(4, 7), np.arange(4) * 10, np.full(4, 10)], axis=1)
    wanted = [(0, number) for number in range(4)]
    reads = [
        plan([shard], wanted, target, offsets=np.arange(4) * CHUNK),
        plan([shard], wanted, parts, firsts=np.arange(5), pieces=pieces),
    ]
    read_chunks(reads, num_threads=3)
    return target, parts


@pytest.mark.parametrize("why", [os.strerror(errno.EIO), os.strerror(errno.ESTALE), "mismatch", "cut short"])
def test_what_a_disk_refused_for_a_moment_is_read_again_and_nothing_else_is(kind, monkeypatch, shard, why, caplog):
    expected = [part.copy() for part in read_four(shard)]
    disk = Disk(monkeypatch, why, times=1 if why in ("mismatch", "cut short") else 3)
    found = read_four(shard)
    assert disk.asked[0] == [4, 4] and all(own == [2, 2] for own in disk.asked[1:])
    assert all(np.array_equal(*pair) for pair in zip([found[1][1:3]], [expected[1][1:3]], strict=True))
    assert np.array_equal(found[0][1:3], expected[0][1:3])
    assert len(disk.waits) == (0 if disk.asked[1:] == [[2, 2]] else 2)
    assert len(caplog.records) == len(disk.waits)
    assert all("chunk 1 of c.0" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("why", "tries", "waits"),
    [(os.strerror(errno.EIO), 5, [0.1, 1.0, 5.0]), ("mismatch", 2, []), ("missing", 1, []), ("Is a directory", 2, [])],
)
def test_what_stays_bad_is_told(monkeypatch, shard, why, tries, waits):
    disk = Disk(monkeypatch, why, times=9)
    with pytest.raises(DamagedChunkError, match=r"^chunk 1 of c\.0") as caught:
        read_four(shard)
    assert (len(disk.asked), disk.waits, caught.value.row) == (tries, waits, 101)


def test_a_file_that_does_not_open_for_a_moment_is_opened_again(monkeypatch, tmp_path):
    write_shard(tmp_path / "c.0")
    waits, errors = [], [errno.EIO, errno.ESTALE]
    real = _shard_file.open_file

    def open_file(path):
        if errors:
            raise OSError(errors.pop(), os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(_shard_file, "open_file", open_file)
    monkeypatch.setattr(_shard_file.time, "sleep", waits.append)
    make = functools.partial(ShardFile, tmp_path / "c.0", NUM_CHUNKS, 0, None, CHUNK + 4)
    assert _shard_file.try_patiently(make).index.shape == (NUM_CHUNKS, 2)
    assert waits == [0.1, 1.0]
    errors[:] = [errno.EACCES]
    monkeypatch.setattr(_shard_file, "_refused", lambda path, row, error: DamagedChunkError(row, "no"))
    with pytest.raises(DamagedChunkError):
        _shard_file.try_patiently(make)
    assert waits == [0.1, 1.0]


@pytest.mark.parametrize(
    "where",
    [
        {"offsets": np.array([1])},
        {"offsets": np.array([-1])},
        {"firsts": np.array([0, 2]), "pieces": np.array([[0, 0, 10]])},
        {"firsts": np.array([-1, 1]), "pieces": np.array([[0, 0, 10]])},
        {"firsts": np.array([0, 1]), "pieces": np.array([[CHUNK - 9, 0, 10]])},
        {"firsts": np.array([0, 1]), "pieces": np.array([[0, CHUNK - 9, 10]])},
        {"firsts": np.array([0, 1]), "pieces": np.array([[-1, 0, 10]])},
        {"firsts": np.array([0, 1]), "pieces": np.array([[0, 0, -10]])},
        {"firsts": np.array([0, 1]), "pieces": np.array([[2**62, 2**62, 2**62]])},
        {"firsts": np.array([0]), "pieces": np.array([[0, 0, 10]])},
        {"offsets": np.array([0, 0])},
    ],
)
def test_nothing_outside_of_a_target_is_written(shard, where):
    if find_native()[0] is None:
        pytest.skip(find_native()[1])
    target = np.zeros(CHUNK, np.uint8)
    with pytest.raises(ValueError, match=r"outside|pieces|needed"):
        read_chunks([plan([shard], [(0, 0)], target, **where)], num_threads=1)
    assert not target.any()


@pytest.mark.parametrize("chunk", [(0, NUM_CHUNKS), (0, -1), (1, 0), (-1, 0)])
def test_nothing_outside_of_an_index_is_read(shard, chunk):
    if find_native()[0] is None:
        pytest.skip(find_native()[1])
    with pytest.raises(ValueError, match="of no file"):
        read_chunks([plan([shard], [chunk], np.zeros(CHUNK, np.uint8), offsets=np.array([0]))], num_threads=1)


def test_a_target_that_may_not_be_written_is_refused(shard):
    if find_native()[0] is None:
        pytest.skip(find_native()[1])
    target = np.zeros(CHUNK, np.uint8)
    target.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        read_chunks([plan([shard], [(0, 0)], target, offsets=np.array([0]))], num_threads=1)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            types.SimpleNamespace(ABI=_chunk_reads._ABI + 1, CRC32C_KIND="table"),
            "of another version: install s4v again",
        ),
        (ImportError("none"), "install a C compiler, then s4v again"),
    ],
)
def test_a_module_that_is_not_there_or_of_another_version_is_not_used(monkeypatch, found, told):
    def give(*_):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.delenv("S4V_NATIVE", raising=False)
    monkeypatch.setattr(_chunk_reads.importlib, "import_module", give)
    find_native.cache_clear()
    try:
        module, said = find_native()
    finally:
        find_native.cache_clear()
    assert module is None and told in said


def test_the_environment_turns_it_off(monkeypatch):
    monkeypatch.setenv("S4V_NATIVE", "0")
    find_native.cache_clear()
    try:
        assert find_native() == (None, "Python (S4V_NATIVE=0)")
    finally:
        find_native.cache_clear()
