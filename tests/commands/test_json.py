"""What scripts read: the shape of every command's `--json`, and its exit code, as they were before (tests/data)."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s4v.cli import COMMANDS, app

GOLDEN = Path(__file__).parents[1] / "data" / "cli_json.json"
"""Made by `python tests/commands/test_json.py` with an s4v from before options were written once; never made again."""

TABLE = "--dataset table --root w --annotations w/videos.csv --column label=shape_motion"
EXTRACT = f"extract --model tiny-clip {TABLE} --resize 224 --device cpu"
CAPTIONS = "--column caption=caption"
TRAIN = "train --features store/w.zarr --device cpu --epochs 1 --batch-size 4"
JOURNEY = {
    "world": "world --out w --train 6 --val 4 --novel 0",
    "datasets": "datasets",
    "scan": f"scan {TABLE} --out scan.parquet",
    "scan, strict": f"scan {TABLE} --out scan.parquet --strict",
    "plan": "plan --model vit-b16 --videos 100 --rate 10 --device cpu",
    "extract": f"{EXTRACT} {CAPTIONS} --frames 4",
    "extract, strict": f"{EXTRACT} --frames 4 --out store/strict.zarr --strict",
    "extract, part": f"{EXTRACT} --frames 4 --out store/part.zarr --codec-from store/w.zarr --part 1/1",
    "extract, other options": f"{EXTRACT} {CAPTIONS} --frames 8",
    "extract, no videos": "extract --model tiny-clip --dataset folder --root nowhere --device cpu",
    "info": "info store/w.zarr",
    "info, no store": "info nowhere.zarr",
    "verify": "verify store/w.zarr",
    "merge": "merge store/part.zarr --out store/merged.zarr",
    "train": f"{TRAIN} --side-width 64 --out runs/side",
    "train, retrieval": f"{TRAIN} --side-width 64 --task retrieval --frames 4 --out runs/texts",
    "train, run exists": f"{TRAIN} --side-width 64 --out runs/side",
    "eval": "eval --run runs/side --device cpu",
    "eval, retrieval": "eval --run runs/texts --device cpu --dual-softmax",
    "compare": "compare --features store/w.zarr --methods linear --epochs 1 --batch-size 4 --device cpu --out runs/c",
    "index": "index --features store/w.zarr --export vectors",
    "retrieve": "retrieve --features store/w.zarr --query circle --device cpu",
    "retrieve, many": "retrieve --features store/w.zarr --queries queries.txt --device cpu",
    "import, no file": "import nowhere.pt --out runs/imported",
    "verify, damage": "verify store/strict.zarr",
}
"""Command lines in their order, by what they are about; each is given `--json`."""

NONE_OR_NUMBER = {".per_class[].precision"}
"""What has a number where there is one: this one where a video was said to be of the class, which weights decide."""

NOT_RUN = {
    "demo": "it takes minutes: tests/demo",
    "sweep": "it came later: tests/train/test_sweep.py",
    "cache": "it came later: tests/commands/test_cache.py",
    "import-features": "it came later: tests/extract/test_released_features.py",
}


def describe(value):
    """A value's shape: keys, and of a list its first item."""
    if isinstance(value, dict):
        return {key: describe(one) for key, one in value.items()}
    if isinstance(value, list):
        return [describe(value[0])] if value else []
    kinds = {bool: "bool", int: "number", float: "number", str: "text", type(None): "none"}
    return kinds[type(value)]


def run_journey(folder, say=lambda _: None):
    """Run every line in a folder; exit code and shape of the JSON by line."""
    answers = {}
    for name, line in JOURNEY.items():
        if name == "scan, strict":  # from here on one video is broken
            broken = sorted((folder / "w").rglob("*.mp4"))[0]
            whole = broken.read_bytes()
            broken.write_bytes(b"no video")
        if name == "extract":
            broken.write_bytes(whole)
        if name == "extract, strict":
            broken.write_bytes(b"no video")
        if name == "verify, damage":
            files = [path for path in (folder / "store/strict.zarr").rglob("*") if path.is_file()]
            shard = max(files, key=lambda path: path.stat().st_size)
            shard.write_bytes(shard.read_bytes()[:-9])
        (folder / "queries.txt").write_text("circle\nsquare\n")
        result = CliRunner().invoke(app, [*line.split(), "--json"])
        lines = [one for one in result.stdout.splitlines() if one.startswith("{")]
        answers[name] = {"exit_code": result.exit_code, "json": describe(json.loads(lines[-1])) if lines else "none"}
        say(f"{name}: {result.exit_code}")
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_journey(folder)


def find_changes(old, new, where=""):
    """Keys that are gone, and values of another kind; what is new may come."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for key in old
            for change in (
                find_changes(old[key], new[key], f"{where}.{key}") if key in new else [f"{where}.{key} is gone"]
            )
        ]
    if isinstance(old, list) and isinstance(new, list):
        return find_changes(old[0], new[0], f"{where}[]") if old and new else []
    is_same = old == new or (where in NONE_OR_NUMBER and {old, new} == {"none", "number"})
    return [] if is_same else [f"{where}: {old} became {new}"]


@pytest.mark.parametrize("name", JOURNEY)
def test_exit_codes_and_keys_are_what_scripts_know(answers, name):
    old, new = json.loads(GOLDEN.read_text())[name], answers[name]
    assert new["exit_code"] == old["exit_code"]
    assert find_changes(old["json"], new["json"]) == []


def test_every_command_takes_part():
    run = {line.split()[0] for line in JOURNEY.values()}
    assert set(COMMANDS) - run == set(NOT_RUN)


if __name__ == "__main__":
    import os
    import sys

    os.chdir(sys.argv[1])
    GOLDEN.write_text(json.dumps(run_journey(Path.cwd(), print), indent=1) + "\n")
