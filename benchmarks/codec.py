"""What int8 costs: tokens of videos it was not fitted on, decoded, against what they were.

    python benchmarks/codec.py [--folder runs/benchmark-codec]
    python benchmarks/codec.py --dinov2 dinov2-s14.safetensors --videos FOLDER

tiny-clip's tokens of the small world, all channels kept, as an extraction measures them; and tokens made up as giant
ViTs have them, those of tests/store/test_affine.py, over twenty draws.

With `--dinov2` (a file that dinov2_weights.py writes) tokens of a real tower: DINOv2 ViT-S/14 at 224 pixels, blocks 0
to 10, of real videos. Every second video fits the codec, the others measure it, at K = D, D/2, D/4 and D/8. All frames
go through the tower once. The largest tokens are told, by their length as a multiple of the median one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import check_bar, describe_machine, format_table, keep

from s4v.backbone.vision_tower import FrameTokens, build_backbone
from s4v.demo.pipeline import EXTRACTION
from s4v.demo.world import ANNOTATIONS_NAME, WorldConfig, write_world
from s4v.extract.codec_fit import FrameSample, fit_codec
from s4v.extract.config import ExtractConfig
from s4v.extract.decode.pool import DecodeRequest, DecoderPool
from s4v.extract.extraction import extract_dataset
from s4v.store.codecs.affine import AffineCodec, fit_scale
from s4v.store.fidelity import LayerFidelity, measure_fidelity
from s4v.store.info import describe_store
from s4v.store.reader import open_store

DRAWS = 20
MODEL = "vit_small_patch14_dinov2"
SIDE = 224
BLOCKS = tuple(range(11))
"""The weights at hand have another last block than DINOv2's."""
FRAMES = 6
"""Of each video."""
MASSIVE = 5
"""So many times the median token's length."""
_TESTS = Path(__file__).parents[1] / "tests" / "store" / "test_affine.py"


def measure_world(folder: Path) -> list[dict[str, Any]]:
    """The layers of an int8 store of the small world, as `s4v info` has them."""
    shutil.rmtree(folder, ignore_errors=True)
    write_world(folder / "world", WorldConfig(num_train=240, num_val=60, num_novel=0))
    places = {"root": folder / "world", "annotations": folder / "world" / ANNOTATIONS_NAME, "out": folder / "int8.zarr"}
    extract_dataset(ExtractConfig(**{**EXTRACTION, **places, "dtype": "int8", "layers": "all"}))
    layers = describe_store(open_store(folder / "int8.zarr"))["fidelity"]["layers"]
    shutil.rmtree(folder)
    return layers


def measure_giants() -> list[LayerFidelity]:
    """Each draw fits on some tokens and is measured on others of the same layer."""
    spec = importlib.util.spec_from_file_location("test_codec", _TESTS)
    assert spec is not None and spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    found = []
    for draw in range(DRAWS):
        fitted, fresh = tests.massive_tokens(2 * draw), tests.massive_tokens(2 * draw + 1)
        mean = fitted.mean(axis=0, keepdims=True)
        rest = fitted - mean
        codec = AffineCodec(
            dtype="int8", mean=mean, scale=fit_scale(np.abs(rest).max(axis=0)[None], rest.std(axis=0)[None])
        )
        found.append(measure_fidelity(fresh, codec.decode(codec.encode(fresh, 0), 0), draw))
    return found


class RememberingTower:
    """A backbone that runs once over the same frames: codecs of several widths are fitted on the same tokens."""

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self._known: dict[str, FrameTokens] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def encode_frames(self, pixels: torch.Tensor, layers: Any) -> FrameTokens:
        """As the backbone gives them."""
        key = hashlib.sha256(pixels.numpy().tobytes() + str(tuple(layers)).encode()).hexdigest()
        if key not in self._known:
            self._known[key] = self._backbone.encode_frames(pixels, layers)
        return self._known[key]


def read_frames(folder: Path) -> dict[str, np.ndarray]:
    """(FRAMES, SIDE, SIDE, 3) uint8 of every video of a folder that decodes, by its name."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    size = (SIDE, SIDE)
    asked = [
        DecodeRequest(path=str(file), num_frames=FRAMES, sampling="uniform", resize="224", image_size=size)
        for file in files
    ]
    with DecoderPool() as pool:
        videos = list(pool.decode_ahead(asked))
    return {file.name: v.pixels[0, :, 0] for file, v in zip(files, videos, strict=True) if v.pixels is not None}


def measure_dinov2(weights: Path, folder: Path) -> dict[str, Any]:
    """What is left of a real tower's tokens, by stored channels and layer, and its largest tokens."""
    tower = build_backbone(MODEL, weights=str(weights), device=torch.device("cpu"), image_size=(SIDE, SIDE))
    backbone: Any = RememberingTower(tower.load_weights())
    frames = read_frames(folder)
    names = list(frames)
    fitted, fresh = names[::2], names[1::2]
    sample = FrameSample(
        np.concatenate([frames[name] for name in fitted]), tuple(name for name in fitted for _ in range(FRAMES))
    )
    pixels = torch.from_numpy(np.concatenate([frames[name] for name in fresh]))
    held_out = [
        torch.cat(layer).flatten(0, 1).numpy()  # (n, D)
        for layer in zip(*(backbone.encode_frames(one, BLOCKS).patches for one in pixels.split(FRAMES)), strict=True)
    ]
    lengths = [np.linalg.norm(tokens, axis=1) for tokens in held_out]
    massive = [
        {
            "layer": block,
            "largest": float(own.max() / np.median(own)),
            "share": float((own > MASSIVE * np.median(own)).mean()),
        }
        for block, own in zip(BLOCKS, lengths, strict=True)
    ]
    width = tower.info.width
    layers: list[dict[str, Any]] = []
    for channels in (width, width // 2, width // 4, width // 8):
        codec = fit_codec("int8", sample, backbone, BLOCKS, channels=channels, batch_size=FRAMES)
        for place, block in enumerate(BLOCKS):
            tokens = held_out[place]
            found = measure_fidelity(tokens, codec.decode(codec.encode(tokens, place), place), block)
            layers.append({"channels": channels, **asdict(found)})
    return {"fitted_on": fitted, "measured_on": fresh, "frames": FRAMES, "layers": layers, "massive": massive}


def tell_dinov2(found: dict[str, Any]) -> str:
    """A line for each number of channels, over all layers; then the largest tokens of each layer."""
    rows = []
    for channels in dict.fromkeys(one["channels"] for one in found["layers"]):
        own = [one for one in found["layers"] if one["channels"] == channels]
        kept = [one["variance_kept"] for one in own]
        medians = [one["normed_error_median"] for one in own]
        shares = [min(kept), statistics.median(kept), statistics.median(medians), max(medians)]
        worst = max(one["normed_error_worst"] for one in own)
        rows.append([channels, *(f"{share:.2%}" for share in shares), f"{worst:.1%}"])
    heads = ["K", "variance kept, worst layer", "median layer"]
    heads += ["error after the norm, median token of the median layer", "of the worst layer", "worst token"]
    massive = [[one["layer"], f"{one['largest']:.1f}", f"{one['share']:.3%}"] for one in found["massive"]]
    others = format_table(["layer", "largest token / median", f"tokens above {MASSIVE} medians"], massive)
    return f"{format_table(heads, rows)}\n\n{others}"


def main() -> None:
    """Measure both, keep the figures; with `--dinov2` those of a real tower alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-codec"))
    parser.add_argument("--dinov2", type=Path, help="weights that dinov2_weights.py writes")
    parser.add_argument("--videos", type=Path, help="folder of real videos, for --dinov2")
    options = parser.parse_args()
    if options.dinov2 is not None:
        found = measure_dinov2(options.dinov2, options.videos)
        machine = describe_machine("torch", "numpy", "timm")
        keep("codec-dinov2", {"machine": machine, **found}, tell_dinov2(found))
        return
    world, giants = measure_world(options.folder), [asdict(one) for one in measure_giants()]
    names = ("error_median", "error_worst", "normed_error_median", "normed_error_worst")
    rows = [[f"tiny-clip, layer {one['layer']}", *(f"{one[name]:.2%}" for name in names)] for one in world]
    rows += [
        [f"giants, {title} of {DRAWS} draws", *(f"{pick([one[name] for one in giants]):.2%}" for name in names)]
        for title, pick in (("median", statistics.median), ("worst", max))
    ]
    heads = ["tokens", "error, median token", "worst token", "after the norm, median token", "worst token"]
    bars = [
        check_bar("tiny-clip, median token, worst layer", 100 * max(one["error_median"] for one in world), 2, " %"),
        check_bar(
            "giants, worst token after the norm", 100 * max(one["normed_error_worst"] for one in giants), 5, " %"
        ),
    ]
    result = {"machine": describe_machine("torch", "numpy"), "world": world, "giants": giants}
    keep("codec", result, format_table(heads, rows), bars)


if __name__ == "__main__":
    main()
