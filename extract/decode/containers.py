"""Which containers are opened, and by what: files alone, formats from a list, nothing that names other files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from .first_bytes import is_archive, name_first_bytes, read_head
from .trouble import DecodeFailure, as_failure

# Containers and bare streams. Left out is what opens other files or the network (hls, dash, concat, sdp, rtsp, imf,
# image2, mlv, vobsub), and what is no video: pictures (jpeg_pipe and its like) and sound.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,live_flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,vc1,"
    "vc1test,h263,h261,dirac,cavsvideo,mjpeg,mpjpeg,ogg,nut,mxf,gxf,lxf,gif,apng,rm,dv,nsv,nuv,pva,wtv,dhav,swf,amv,"
    "yuv4mpegpipe,flic,roq,smk,bink,ty,ffm,mjpeg_2000,smjpeg"
)
_CONTAINER_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}

MAX_PACKETS = 8_000_000
"""Of a stream: 37 hours at 60 frames a second."""
MAX_FRAME_PIXELS = 1 << 26
"""Of a frame: 8192 x 8192."""

_MP4_STARTS = frozenset(
    {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx", b"moof", b"uuid"}
)
_EBML = b"\x1a\x45\xdf\xa3"
_PARENTS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"dinf", b"stbl", b"moof", b"traf"})
_MAX_BOXES = 1_000_000


def open_container(path: Path, head: bytes | None = None) -> Any:
    """Open a file with PyAV: by the `file` protocol, as one of `FORMATS`, whatever its metadata are.

    Args:
        path: The file.
        head: Its first bytes; None reads them.

    Raises:
        DecodeFailure: With the code `unreadable` and what the first bytes are, where it is none of them.
        DecodeTrouble: If the machine is to blame.
    """
    head = read_head(path) if head is None else head
    if is_archive(head):
        raise DecodeFailure("unreadable", f"it is {name_first_bytes(head)}")
    try:
        container = av.open(str(path.absolute()), metadata_errors="ignore", container_options=_CONTAINER_OPTIONS)
    except av.FFmpegError as error:
        failure = as_failure(error, path, "unreadable")
        if failure.code != "unreadable":
            raise failure from error
        name = name_first_bytes(head)
        why = f"it is {name}" if name else "not the start of a video, or damaged"
        raise DecodeFailure("unreadable", why) from error
    # The library checks this too; a build without that check must not open a playlist.
    if not set(container.format.name.split(",")) & set(FORMATS.split(",")):
        container.close()
        raise DecodeFailure("unreadable", f"files of the kind {container.format.name} are not read")
    return container


def may_decord_open(head: bytes) -> bool:
    """Whether a file begins as the two kinds do that decord is given: MP4's boxes or Matroska's EBML.

    decord brings an FFmpeg of its own, which opens playlists and whatever they name, under any file name.
    """
    return head[4:8] in _MP4_STARTS or head.startswith(_EBML)


@dataclass(slots=True)
class Boxes:
    """What the boxes of an MP4 say before a library is to believe them."""

    num_movies: int = 0
    """Headers (`moov`) with frames of their own: two, where files were put one after the other."""
    num_bare_samples: int = 0
    """The most samples that a table announces without a byte for each of them."""
    is_elsewhere: bool = False
    """Whether a track says that its data lie in another file."""
    num_visited: int = field(default=0, repr=False)


def check_boxes(path: Path, head: bytes) -> Boxes:
    """Refuse an MP4 whose tables announce more than its bytes can hold: a library would make room for all of it.

    Raises:
        DecodeFailure: `too-large` or `truncated`, with the numbers.
        OSError: If the file cannot be read.
    """
    boxes = Boxes()
    if head[4:8] not in _MP4_STARTS:
        return boxes
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        _walk(file.fileno(), 0, size, boxes)
    if boxes.num_bare_samples > MAX_PACKETS:
        raise DecodeFailure(
            "too-large", f"{boxes.num_bare_samples} frames are announced, at most {MAX_PACKETS} are read"
        )
    if boxes.num_bare_samples > size:
        raise DecodeFailure("truncated", f"{boxes.num_bare_samples} samples are announced in a file of {size} bytes")
    if boxes.num_movies > 1:
        raise DecodeFailure(
            "truncated",
            f"{boxes.num_movies} files stand one after the other in it, and players show the first: join them with "
            "ffmpeg's concat, or take them apart",
        )
    return boxes


def _walk(descriptor: int, start: int, end: int, boxes: Boxes) -> bool:
    """Visit boxes; returns whether one among them holds a table of samples."""
    has_samples = False
    while start + 8 <= end:
        boxes.num_visited += 1
        header = os.pread(descriptor, 32, start)
        if len(header) < 8 or boxes.num_visited > _MAX_BOXES:
            break
        length, kind, body = int.from_bytes(header[:4], "big"), header[4:8], 8
        if length == 1 and len(header) >= 16:
            length, body = int.from_bytes(header[8:16], "big"), 16
        elif length == 0:
            length = end - start
        if length < body:
            break
        if kind in _PARENTS:
            is_filled = _walk(descriptor, start + body, min(start + length, end), boxes)
            boxes.num_movies += kind == b"moov" and is_filled
            has_samples |= is_filled
        elif kind == b"stsz" and len(header) >= body + 12:
            sample_bytes = int.from_bytes(header[body + 4 : body + 8], "big")
            count = int.from_bytes(header[body + 8 : body + 12], "big")
            has_samples |= count > 0
            if sample_bytes or 4 * count > length:
                boxes.num_bare_samples = max(boxes.num_bare_samples, count)
        elif kind == b"dref" and len(header) >= body + 20:
            boxes.is_elsewhere |= not header[body + 19] & 1
        elif kind == b"trun" and len(header) >= body + 8:
            flags = int.from_bytes(header[body + 1 : body + 4], "big")
            count = int.from_bytes(header[body + 4 : body + 8], "big")
            if not flags & 0xF00 or 4 * count > length:
                boxes.num_bare_samples = max(boxes.num_bare_samples, count)
        start += length
    return has_samples
