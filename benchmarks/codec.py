"""What int8 costs: tokens of videos it was not fitted on, decoded, against what they were.

    python benchmarks/codec.py [--folder runs/benchmark-codec]

tiny-clip's tokens of the small world, all channels kept, as an extraction measures them; and tokens made up as giant
ViTs have them, those of tests/store/test_affine.py, over twenty draws.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _report import check_bar, describe_machine, format_table, keep

from s4v.demo.pipeline import EXTRACTION
from s4v.demo.world import ANNOTATIONS_NAME, WorldConfig, write_world
from s4v.extract.config import ExtractConfig
from s4v.extract.extraction import extract_dataset
from s4v.store.codecs.affine import AffineCodec, fit_scale
from s4v.store.fidelity import LayerFidelity, measure_fidelity
from s4v.store.info import describe_store
from s4v.store.reader import open_store

DRAWS = 20
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


def main() -> None:
    """Measure both, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-codec"))
    options = parser.parse_args()
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
