"""What a file is that is no video: told by its first bytes, and what to do about it where something can be done."""

from __future__ import annotations

from pathlib import Path

_HEAD_BYTES = 1024

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (0, b"GIF8", "a GIF picture"),
    (0, b"BM", "a BMP picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (8, b"WEBP", "a WebP picture"),
    (4, b"ftypheic", "a HEIC picture"),
    (4, b"ftypheix", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIF picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (0, b"8BPS", "a Photoshop picture"),
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer: run git lfs pull"),
    (0, b"version https://hawser.github.com/spec/", "a Git LFS pointer: run git lfs pull"),
    (0, b"PK\x03\x04", "a zip archive: unpack it"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"\x1f\x8b", "gzip-compressed: unpack it"),
    (0, b"BZh", "bzip2-compressed: unpack it"),
    (0, b"\xfd7zXZ\0", "xz-compressed: unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed: unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (0, b"Rar!\x1a\x07", "a RAR archive: unpack it"),
    (257, b"ustar", "a tar archive: unpack it"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"\x7fELF", "a program"),
    (0, b"MZ", "a program"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"PAR1", "a Parquet table"),
    (0, b"\x89HDF\r\n", "an HDF5 file"),
    (0, b"ID3", "an MP3 sound file"),
    (0, b"fLaC", "a FLAC sound file"),
    (8, b"WAVE", "a WAVE sound file"),
    (0, b"ftypM4A", "a sound file"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
)
_TEXTS: tuple[tuple[bytes, str], ...] = (
    (b"#extm3u", "a playlist (m3u8), which names other files: download what it names"),
    (b"[playlist]", "a playlist, which names other files"),
    (b"ffconcat version", "a list of files for ffmpeg's concat"),
    (b"<!doctype html", "an HTML page: the download gave a web page, not the video"),
    (b"<html", "an HTML page: the download gave a web page, not the video"),
    (b"/annex/objects/", "a git-annex pointer: run git annex get"),
    (b".git/annex/objects/", "a git-annex pointer: run git annex get"),
    (b"<mpd", "a DASH manifest, which names other files"),
    (b"<svg", "an SVG picture"),
    (b"<?xml", "an XML file"),
    (b"v=0", "a session description (SDP), which names other streams"),
    (b"{", "a JSON text"),
)


def name_first_bytes(head: bytes) -> str | None:
    """Say what a file is by how it begins; None where that is not known.

    Args:
        head: Its first bytes, up to 1024 of them.
    """
    for place, magic, name in _MAGIC:
        if head[place : place + len(magic)] == magic:
            return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    # An HTML page or a manifest may say first that it is XML.
    inner = text[text.find(b"?>") + 2 :].lstrip() if text.startswith(b"<?xml") else b""
    for candidate in (inner, text):
        for start, name in _TEXTS:
            if candidate.startswith(start):
                return name
    if head and not head.strip(b"\0"):
        return "zeros alone: a download or copy that never came to its end"
    if _is_text(head):
        return "a text"
    return None


def is_archive(head: bytes) -> bool:
    """Whether a file is packed: a video that lies in it must not be taken for the file."""
    return (name_first_bytes(head) or "").endswith(": unpack it")


def read_head(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        return file.read(_HEAD_BYTES)


def _is_text(head: bytes) -> bool:
    for encoding in ("utf-8", "utf-16") if head[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8",):
        try:
            text = head.decode(encoding, errors="strict")
        except UnicodeDecodeError as error:
            if error.start < len(head) - 4:  # a character may be cut at the end
                continue
            text = head[: error.start].decode(encoding)
        if text and all(character.isprintable() or character in "\r\n\t\f" for character in text):
            return True
    return False
