"""What a row knows of its source, and how a changed one is told (A2 and B1, as far as decoders see them)."""

import hashlib
import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from s4v.extract.decode import source
from s4v.extract.decode import worker as _decoder
from s4v.extract.decode.source import SourceFacts, is_same_source, read_source
from s4v.extract.decode.worker import LastVideo, decode

MB = 1 << 20


def ask(path, **changes):
    request = dict(path=str(path), num_frames=3, sampling="uniform", resize="224", image_size=(48, 48), decoder="auto")
    return {**request, "start_s": None, "end_s": None, **changes}


def is_same(facts: SourceFacts, path) -> bool:
    return is_same_source(facts.source_bytes, facts.source_mtime_ns, facts.source_hash, path)


def test_the_hash_of_a_small_file_is_that_of_all_its_bytes(tmp_path):  # B1
    path = tmp_path / "v.mp4"
    path.write_bytes(os.urandom(3 * MB + 17))
    facts = read_source(path)
    assert facts.source_hash == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert (facts.source_bytes, facts.source_mtime_ns) == (3 * MB + 17, path.stat().st_mtime_ns)


def test_of_a_large_file_fixed_samples_are_hashed_and_the_row_says_so(tmp_path):  # B1
    path = tmp_path / "v.mp4"
    data = bytearray(np.random.default_rng(0).bytes(20 * MB))
    path.write_bytes(data)
    facts = read_source(path)
    assert facts.source_hash.startswith("sha256-samples:") and read_source(path) == facts
    pieces = list(source._pieces(len(data)))
    assert len(pieces) == 18 and sum(length for _, length in pieces) == 6 * MB
    for start in (5, 20 * MB - 5, pieces[1][0], pieces[9][0] + 100):
        changed = bytearray(data)
        changed[start] ^= 1
        path.write_bytes(changed)
        assert read_source(path).source_hash != facts.source_hash
    path.write_bytes(data + b"x")
    assert read_source(path).source_hash != facts.source_hash


def test_pieces_lie_in_the_file_and_apart_whatever_its_size():  # B1
    for size in (8 * MB + 1, 9 * MB, 100 * MB, 7 * 1024 * MB + 3):
        pieces = list(source._pieces(size))
        assert pieces == sorted(pieces) and pieces[0] == (0, MB) and sum(pieces[-1]) == size
        assert all(start + length <= following for (start, length), (following, _) in itertools.pairwise(pieces))
    assert list(source._pieces(8 * MB)) == [(0, 8 * MB)]


def test_a_folder_of_frames_is_a_source(tmp_path, make_frames):  # B1
    folder = make_frames(tmp_path / "v", num_frames=5)
    facts = read_source(folder)
    assert facts.source_hash.startswith("sha256-frames:")
    assert facts.source_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert facts.source_mtime_ns == max(file.stat().st_mtime_ns for file in folder.iterdir())
    (folder / "notes.txt").write_text("not a frame")
    assert read_source(folder) == facts and is_same(facts, folder)
    os.utime(folder / "00002.jpg", ns=(1, 1))
    assert is_same(facts, folder), "a copy"
    Image.new("RGB", (80, 64)).save(folder / "00002.jpg")
    assert not is_same(facts, folder)
    (folder / "00002.jpg").unlink()
    assert not is_same(facts, folder)


def test_time_alone_is_not_trusted_and_size_alone_is(tmp_path, monkeypatch):  # B1
    path = tmp_path / "v.mp4"
    path.write_bytes(b"a" * 1000)
    facts = read_source(path)
    read = []
    monkeypatch.setattr(source, "_read_file_source", lambda p, f=source._read_file_source: read.append(p) or f(p))
    assert is_same(facts, path) and read == [], "nothing is hashed where size and time are the same"
    os.utime(path, ns=(5, 5))
    assert is_same(facts, path) and len(read) == 1
    path.write_bytes(b"b" * 1000)
    assert not is_same(facts, path) and len(read) == 2
    path.write_bytes(b"a" * 999)
    assert not is_same(facts, path) and len(read) == 2, "nothing is hashed where the size differs"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        is_same(facts, path)
    with pytest.raises(FileNotFoundError):
        read_source(path)
    with pytest.raises(ValueError, match="expected a row that knows its source"):
        is_same_source(None, None, None, path)


def test_a_file_in_place_of_a_folder_is_another_source(tmp_path, make_frames):  # B1
    folder = make_frames(tmp_path / "v", num_frames=2)
    facts = read_source(folder)
    folder.rename(tmp_path / "w")
    folder.write_bytes(b"x" * facts.source_bytes)
    assert not is_same(facts, folder)


def test_segments_of_a_file_share_one_hash(tmp_path, make_video, monkeypatch):  # B1
    path = make_video(tmp_path / "v.mp4", num_frames=40)
    read = []
    monkeypatch.setattr(_decoder, "read_source", lambda p, f=read_source: read.append(p) or f(p))
    last_video = LastVideo()
    hashes = {
        decode(ask(path, start_s=start, end_s=start + 1), lambda _: None, last_video)[0]["source_hash"]
        for start in (0.0, 1.0, 2.0)
    }
    assert len(hashes) == 1 and len(read) == 1
    decode(ask(path, num_frames=0), lambda _: None, last_video)
    assert len(read) == 1, "a length alone needs no hash"
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    decode(ask(path, start_s=0.0, end_s=1.0), lambda _: None, last_video)
    assert len(read) == 2


def test_hashing_costs_little_beside_decoding(tmp_path, make_video):  # B1
    """The bar is a fiftieth of an extraction; this only finds a hash that is ten times slower."""
    path = make_video(tmp_path / "v.mp4", num_frames=60, size=(320, 240))

    def cpu(run):
        start = time.process_time()
        run()
        return time.process_time() - start

    hashing = min(cpu(lambda: read_source(path)) for _ in range(5))
    decoding = min(cpu(lambda: decode(ask(path), lambda _: None)) for _ in range(3))
    assert hashing < 0.1 * decoding, (hashing, decoding)


def test_source_imports_neither_torch_nor_pyarrow():
    code = "import sys, s4v.extract.decode.source; print({'torch', 'pyarrow', 'numpy'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
