"""From a data set to its figure, one line a command: miniatures of all ten, with no option but where things lie."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.store.reader import open_store
from s4v.train.run_folder import open_run, read_metrics

KINETICS = dict(sampling="reference-k400", resize="256", frames={"train": 16, "val": 32, "": 8}, clips=(4, 0))
SOMETHING = dict(sampling="reference-sth", resize="256x320", frames={"train": 16, "val": 24, "": 8}, clips=(2, 1))
RETRIEVAL = dict(sampling="reference-retrieval", resize="224", frames={"train": 24, "": 12}, clips=(1, 0))
RECIPES = {
    **{name: {**KINETICS, "recipe": "k400"} for name in ("k400", "k600", "k700", "ucf101", "hmdb51")},
    **{name: {**SOMETHING, "recipe": name} for name in ("ssv1", "ssv2")},
    **{name: {**RETRIEVAL, "recipe": name} for name in ("msrvtt", "msvd", "vatex")},
}
CAPTIONED = ("msrvtt", "msvd", "vatex")


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def sample_reference(name, num_frames, size, num_clips):
    """The reference's test clips, written down once more from its formulas."""
    if name == "reference-k400":
        starts = np.floor(np.linspace(0, num_frames / size - 1, num_clips))
        return [(np.trunc(t + num_frames / size * np.arange(size)) % num_frames).astype(int).tolist() for t in starts]
    if name == "reference-sth":
        step = (num_frames - 1) / size
        return [
            (np.round(step * np.arange(size)) + np.floor(step / (num_clips + 1) * (c + 1))).astype(int).tolist()
            for c in range(num_clips)
        ]
    step = num_frames / size
    is_long = num_frames > size
    return [[int(step / 2 + step * i) if is_long else 0 for i in range(size)]]


def check_store(path, expected):
    """What the recipe says is what rows hold, split by split."""
    store = open_store(path)
    attributes, (clips, held) = store.attributes, expected["clips"]
    recorded = {name: attributes[name] for name in ("sampling", "resize", "frames", "recipe")}
    assert recorded == {name: expected[name] for name in recorded}
    rows = store.read_manifest().to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        is_test = row["split"] == "val" and clips > 1
        frames = expected["frames"].get(row["split"], expected["frames"][""])
        assert (row["num_cached_frames"], row["num_views"]) == (frames, 3 if is_test else 1)
        size = 12 if expected["resize"] == "224" else 8
        width, height = {"256": (91, 73), "256x320": (91, 73), "224": (80, 64)}[expected["resize"]]
        assert (row["views"][0]["resized_width"], row["views"][0]["resized_height"]) == (width, height)
        if row["split"] == "train":
            continue
        indices, number = np.asarray(row["frame_indices"]), clips if is_test else 1
        shown = [indices[clip].tolist() for clip in row["eval_clips"]]
        assert shown == sample_reference(expected["sampling"], row["num_frames"], size, number)
        one = sample_reference(expected["sampling"], row["num_frames"], size, 1)
        if is_test and held:
            assert [indices[row["validation_clip"]].tolist()] == one, "the clip that training validates on"
        else:
            assert row["validation_clip"] is None and one == shown[:1]


@pytest.mark.slow  # k400's and msrvtt's lines are run with every test: test_documented_lines.py
@pytest.mark.parametrize("name", RECIPES)
def test_a_data_set_goes_to_its_figure(name, write_miniature, tmp_path):
    root, store, out = write_miniature(name, tmp_path / "videos"), tmp_path / "s.zarr", tmp_path / "run"
    expected = RECIPES[name]
    told = run("extract", "--dataset", name, "--model", "tiny-clip", "--root", root, "--out", store)
    assert re.search(rf"the recipe of {name}(, protocol [\w-]+)? \(Side4Video's of ", told.stderr)
    assert expected["sampling"] in told.stderr
    check_store(store, expected)
    told = run("train", "--features", store, "--out", out)
    is_captioned = name in CAPTIONED
    assert ("is made for retrieval" in told.stderr) == is_captioned
    config = open_run(out).config
    assert (config["task"], config["frames"]) == (("retrieval", 12) if is_captioned else ("recognition", 8))
    last = read_metrics(open_run(out))[-1]
    has_val = name != "msrvtt"
    assert (("val_r1" if is_captioned else "val_top1") in last) == has_val
    if is_captioned:
        told = run("eval", "--run", out, *(("--split", "test") if has_val else ()))
        figures = json.loads((out / "eval_test.json").read_text())
        assert figures["videos"] == 2 and figures["text_to_video"]["queries"] == (2 if name == "msrvtt" else 4)
        assert re.search(r"\bR@1\b", told.stdout) and f"{100 * figures['text_to_video']['r1']:.1f}" in told.stdout
        return
    told = run("eval", "--run", out)
    figures = json.loads((out / "eval_val.json").read_text())
    assert figures["clips_per_video"] == "as recorded" and figures["videos"] == (
        2 if name in ("ucf101", "hmdb51") else 1
    )
    assert f"top1 {figures['top1']:.1%}" in told.stdout
