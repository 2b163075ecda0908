"""What a side network keeps of a real tower's tokens: the small world through DINOv2, one store recoded.

    python benchmarks/accuracy_dinov2.py --weights dinov2-s14.safetensors [--seeds 3] [--epochs 14]

DINOv2 ViT-S/14 at 112 pixels (dinov2_weights.py writes the file), blocks 5 and 10, 8 x 8 patches. The videos go
through the tower once, into a store of float32. The other stores hold its rows, coded: the codec is fitted as an
extraction fits it, on frames of 64 training videos. Side networks are the demo's but for their epochs, with the same
seeds on all stores; one sees tokens that are zeroed. Every training that is done is a line of results.jsonl in
--folder: run again, it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _report import describe_machine, format_table, keep
from _stores import change_store, read_records
from _trainings import Lines, summarise_pairs, tell_difference, train_and_evaluate

from s4v.backbone.vision_tower import build_backbone
from s4v.demo.pipeline import EXTRACTION, RECIPES
from s4v.demo.world import ANNOTATIONS_NAME, WorldConfig, write_world
from s4v.extract.codec_fit import FrameSample, fit_codec, group_for_calibration
from s4v.extract.config import ExtractConfig
from s4v.extract.extraction import extract_dataset
from s4v.store.codecs.contract import Codec
from s4v.store.fidelity import measure_fidelity
from s4v.store.reader import StoreReader, is_store, open_store
from s4v.store.writer import RowTokens
from s4v.train.allocator import keep_freed_memory

MODEL = "vit_small_patch14_dinov2"
SIDE = 112
LAYERS = (5, 10)
"""That the side network reads. The store has the last block too, which is not DINOv2's own in these weights."""
REFERENCE = "float32"
ARMS = {REFERENCE: None, "int8": 1, "int8, K = D/8": 8, "tokens zeroed": None}
"""By name: D over the stored channels; None reads the store of float32."""
SAMPLE_VIDEOS = 64
FRAMES = 4
"""Cached ones of a video, as in the demo."""
FRESH_VIDEOS = 16
"""That measure what is left of tokens, and fit nothing."""


def make_store(folder: Path, weights: Path) -> StoreReader:
    """The tower's tokens in float32."""
    path = folder / "float32.zarr"
    places = {"root": folder / "world", "annotations": folder / "world" / ANNOTATIONS_NAME, "out": path}
    tower = {"model": MODEL, "weights": str(weights), "input_size": (SIDE, SIDE)}
    layers = ",".join(map(str, LAYERS))
    extract_dataset(
        ExtractConfig(**{**EXTRACTION, **places, **tower, "layers": layers, "dtype": "float32", "device": "cpu"})
    )
    return open_store(path)


def order_for_calibration(store: StoreReader) -> list[int]:
    """Good training rows as an extraction takes them to fit its codec."""
    records = read_records(store)
    place = {record.video_id: row for row, record in enumerate(records)}
    is_good = np.array(store.read_manifest(["status"])["status"]) == "ok"
    training, _ = group_for_calibration(records, seed=0)
    return [row for row in (place[record.video_id] for record in training) if is_good[row]]


def fit(store: StoreReader, weights: Path, channels: int) -> Codec:
    """As an extraction fits it: on two frames of each of the first videos in that order."""
    tower = build_backbone(MODEL, weights=str(weights), device=torch.device("cpu"), image_size=(SIDE, SIDE))
    rows = order_for_calibration(store)[:SAMPLE_VIDEOS]
    pixels = np.concatenate([store.read_row(row, 1, FRAMES)["pixels"][0, ::2, 0] for row in rows])
    ids = tuple(str(row) for row in rows for _ in range(FRAMES // 2))
    return fit_codec(
        "int8", FrameSample(pixels, ids), tower.load_weights(), store.layout.layers, channels=channels, batch_size=32
    )


def recode(store: StoreReader, out: Path, weights: Path, channels: int) -> None:
    """A store of the same rows, their patches coded; one that is there is gone on with."""
    codec = open_store(out).codec if is_store(out) else fit(store, weights, channels)
    layout = replace(store.layout, patch_dtype="int8", channels=channels)
    change_store(store, out, layout, codec, lambda row: code(store, codec, row))


def code(store: StoreReader, codec: Codec, row: int) -> RowTokens:
    """A row, its patches coded."""
    values = store.read_row(row, 1, FRAMES)
    patches = values.pop("patches")  # (1, F, L, N, D)
    codes = np.stack([codec.encode(patches[:, :, place], place) for place in range(patches.shape[2])], axis=2)
    values["cls"] = values["cls"].astype(np.float16)  # as beside int8 patches
    return RowTokens(patches=codes, **values)


def measure_kept(store: StoreReader, coded: StoreReader) -> list[float]:
    """The variance kept by each layer's codes, of training videos that fitted no codec."""
    rows = order_for_calibration(store)[SAMPLE_VIDEOS : SAMPLE_VIDEOS + FRESH_VIDEOS]
    plain = np.concatenate([store.read_row(row, 1, FRAMES)["patches"] for row in rows])
    codes = np.concatenate([coded.read_row(row, 1, FRAMES)["patches"] for row in rows])
    kept = []
    for place, layer in zip(store.layer_places(LAYERS), LAYERS, strict=True):
        tokens = plain[:, :, place].reshape(-1, plain.shape[-1])
        back = coded.codec.decode(codes[:, :, place].reshape(-1, codes.shape[-1]), place)
        kept.append(measure_fidelity(tokens, np.asarray(back), layer).variance_kept)
    return kept


def prepare(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, list[float]]]:
    """The arms' stores, and what their codes keep."""
    world = WorldConfig(num_train=options.train, num_val=options.val, num_novel=0)
    if not (folder / "world" / ANNOTATIONS_NAME).is_file():
        write_world(folder / "world", world)
    store = make_store(folder, options.weights)
    paths, kept = {}, {}
    for arm, share in ARMS.items():
        paths[arm] = store.path
        if share is not None:
            channels = store.layout.width // share
            paths[arm] = folder / f"int8-{channels}.zarr"
            recode(store, paths[arm], options.weights, channels)
            kept[arm] = measure_kept(store, open_store(paths[arm]))
    return paths, kept


def main() -> None:
    """Make the stores, do the trainings that are missing, seed by seed; then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="that dinov2_weights.py writes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=2400)
    parser.add_argument("--val", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--folder", type=Path, default=Path("runs/accuracy-dinov2"))
    options = parser.parse_args()
    keep_freed_memory()
    settings = {name: getattr(options, name) for name in ("epochs", "train", "val")}
    lines = Lines(options.folder / "results.jsonl", settings)
    paths, kept = prepare(options.folder, options)
    for seed in range(options.seeds):
        for arm, store in paths.items():
            if lines.holds(arm, seed):
                continue
            recipe = {**RECIPES["pixels only" if arm == "tokens zeroed" else "side network"], "epochs": options.epochs}
            run = options.folder / "runs" / f"{store.stem}-{recipe.get('inputs', 'all')}-{seed}"
            lines.add(arm, seed, train_and_evaluate(store, run, seed=seed, device="cpu", layers=LAYERS, **recipe))
    summaries = summarise_pairs(lines.done, list(ARMS), REFERENCE)
    rows = []
    for one in summaries:
        shares = ", ".join(f"{share:.1%}" for share in kept.get(one["arm"], ()))
        of_seeds = ", ".join(f"{top1:.1%}" for top1 in one["top1_of_seeds"])
        difference = "" if one["arm"] == REFERENCE else tell_difference(one)
        rows.append([one["arm"], shares, f"{one['top1']:.1%}", of_seeds, difference])
    heads = ["tokens", f"variance kept, blocks {LAYERS[0]} and {LAYERS[1]}", "top-1", "of each seed",
             "points from float32, 95 %"]  # fmt: skip
    result = {"machine": describe_machine("torch", "timm"), **settings, "variance_kept": kept, "summaries": summaries,
              "runs": lines.done}  # fmt: skip
    keep("accuracy_dinov2", result, format_table(heads, rows))


if __name__ == "__main__":
    main()
