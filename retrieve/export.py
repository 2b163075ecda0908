"""Vectors in the layout that clip-retrieval's `index` command reads: img_emb/*.npy beside metadata/*.parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from ..errors import StoreExistsError
from ..store.manifest import write_table
from ..store.reader import StoreReader
from .index_reader import VideoIndex

_VIDEOS_PER_FILE = 1_000_000


def export_vectors(store: StoreReader, index: VideoIndex, folder: Path) -> int:
    """Write the pooled vector of every good video, and what it is of.

    Args:
        store: Whose index it is.
        index: Open.
        folder: A new one.

    Returns:
        The number of videos.

    Raises:
        StoreExistsError: If the folder holds anything.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreExistsError(f"{folder} exists. Nothing was written: choose another --export.")
    rows = np.asarray(index.rows)
    table = store.read_manifest(["video_id", "path", "split", "class_name"]).take(rows)
    captions: dict[str, str] = {}
    for caption in store.read_captions().to_pylist():
        captions.setdefault(caption["video_id"], caption["text"])
    metadata = pa.table(
        {
            "image_path": table["path"],
            "caption": [captions.get(video_id) for video_id in table["video_id"].to_pylist()],
            **{name: table[name] for name in ("video_id", "split", "class_name")},
        }
    )
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, first in enumerate(range(0, len(rows), _VIDEOS_PER_FILE)):
        vectors = index.read_vectors(slice(first, first + _VIDEOS_PER_FILE))
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors)
        write_table(folder / "metadata" / f"metadata_{number}.parquet", metadata.slice(first, len(vectors)))
    return len(rows)
