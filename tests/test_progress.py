"""Told where nobody watches: stderr in a file gets plain lines, at once, at each stage, and once a minute."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from s4v.backbone.vision_tower import Backbone
from s4v.cli import app
from s4v.extract.codec_fit import frames_per_video
from s4v.store.codecs import affine as codec
from s4v.store.layout import StoreLayout
from s4v.store.reader import open_store

EXTRACT = ["extract", "--model", "tiny-clip", "--weights", "random", "--device", "cpu", "--decoders", "1"]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def stages(result, command):
    """What stderr says of a command's stages, each line once."""
    lines = [line for line in result.stderr.splitlines() if line.startswith(f"s4v {command}: ")]
    return [line.removeprefix(f"s4v {command}: ") for line in lines]


@pytest.fixture
def one_video_folder(tmp_path, make_video):
    make_video(tmp_path / "one/a.mp4", num_frames=40)
    return tmp_path / "one"


def test_an_extraction_tells_each_stage_in_a_line(video_folder, tmp_path):
    """F1."""
    out = tmp_path / "s.zarr"
    result = run(*EXTRACT, "--frames", "4", "--dataset", "folder", "--root", video_folder, "--out", out, "--json")
    assert stages(result, "extract") == [
        "loading the libraries",
        "listing the videos",
        "building the backbone",
        "loading the weights: random:0",
        "decoding for calibration: 9 videos, 15 frames of each",
        "calibrating the codec: 8 videos, 108 frames through the backbone",
        "extracting: 11 rows",
        "decoding to measure the codec",
        "measuring the codec: 2 videos, 24 frames through the backbone, time 1 of 2",
        "measuring the codec: 2 videos, 24 frames through the backbone, time 2 of 2",
    ]
    assert "\x1b" not in result.stderr and "\r" not in result.stderr
    assert len(result.stdout.splitlines()) == 1, "JSON alone"


def test_captions_lengths_and_the_other_commands_are_told(captioned_folder, make_video, tmp_path):
    """F1: scan, merge, verify, index, --segment and captions."""
    out = tmp_path / "c.zarr"
    table = ["--dataset", "table", "--root", captioned_folder, "--annotations", captioned_folder / "videos.csv"]
    made = run(*EXTRACT, "--frames", "2", *table, "--dtype", "float32", "--resize", "224", "--out", out)
    assert "embedding captions: 19 captions" in stages(made, "extract")
    assert stages(run("verify", out), "verify") == ["checking the hashes", "verifying: 13 shards"]
    merged = stages(run("merge", out, "--out", tmp_path / "m.zarr"), "merge")
    assert merged[:2] == ["checking the stores", "merging: 13 shards"]
    indexed = stages(run("index", "--features", out), "index")
    assert indexed[:1] + indexed[-1:] == ["loading the libraries", "indexing: 12 rows"]
    scanned = stages(run("scan", *table, "--out", tmp_path / "scan.parquet", "--decoders", "1"), "scan")
    assert scanned == ["loading the libraries", "listing the videos", "scanning: 13 videos"]

    make_video(tmp_path / "long/a.mp4", num_frames=40)
    cut = ["--dataset", "folder", "--root", tmp_path / "long", "--segment", "2", "--dtype", "float32"]
    cut = run(*EXTRACT, "--frames", "2", *cut, "--out", tmp_path / "cut.zarr")
    assert "reading lengths: 1 videos" in stages(cut, "extract")


def test_joining_many_shards_is_a_stage(one_video_folder, tmp_path, monkeypatch):
    """F1."""
    monkeypatch.setattr("s4v.extract.extraction._MANY_SHARDS", 1)
    command = [*EXTRACT, "--dataset", "folder", "--root", one_video_folder, "--dtype", "float32", "--frames", "2"]
    assert stages(run(*command, "--out", tmp_path / "s.zarr"), "extract")[-1] == "joining the manifest"


def test_the_first_line_comes_before_torch_is_imported(tmp_path):
    """F1."""
    command = [*EXTRACT, "--dataset", "folder", "--root", str(tmp_path / "none"), "--out", str(tmp_path / "s.zarr")]
    code = f"""
import io, sys
class Probe(io.StringIO):
    def write(self, text):
        if text.strip() and not seen:
            seen.append((text.strip(), 'torch' in sys.modules))
        return len(text)
seen, sys.stderr = [], Probe()
from s4v.cli import app
app({command!r}, standalone_mode=False)
print(seen)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.stdout.strip() == "[('s4v extract: loading the libraries', False)]", told.stderr


@pytest.fixture
def clock():
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def lines():
    return []


@pytest.fixture
def progress(lines, clock):
    from s4v.progress import LineProgress

    return LineProgress("extract", lines.append, clock)


def test_one_line_a_minute_with_rate_and_time_left(progress, lines, clock):
    """F1."""
    progress.report("scanning", 0, 6000)
    for done in range(1, 241):  # one a second
        clock.now += 1
        progress.report("scanning", done, 6000)
    assert lines == [
        "s4v extract: scanning: 6,000 videos",
        "s4v extract: scanning: 1 of 6,000 videos, 1.0 videos/s, about 1.7 h left",
        "s4v extract: scanning: 61 of 6,000 videos, 1.0 videos/s, about 1.6 h left",
        "s4v extract: scanning: 121 of 6,000 videos, 1.0 videos/s, about 1.6 h left",
        "s4v extract: scanning: 181 of 6,000 videos, 1.0 videos/s, about 1.6 h left",
    ]


def test_a_quick_stage_takes_one_line_and_a_long_one_says_when_it_ends(progress, lines, clock):
    """F1."""
    for done in range(50):
        clock.now += 1
        progress.report("merging", done, 50)
    progress.report("joining the manifest", 0, 0)
    clock.now += 200
    progress.finish()
    assert lines == [
        "s4v extract: merging: 50 shards",
        "s4v extract: joining the manifest",
        "s4v extract: joining the manifest: done in 3.3 min",
    ]


def test_a_stage_that_reports_nothing_is_told_all_the_same(progress, lines, clock):
    """F1: loading a giant's weights, or a decoder that hangs."""
    progress.report("loading the weights: random:0", 0, 0)
    for _ in range(130):
        clock.now += 1
        progress.tick()
    assert lines == [
        "s4v extract: loading the weights: random:0",
        "s4v extract: loading the weights: for 1.0 min now",
        "s4v extract: loading the weights: for 2.0 min now",
    ]


def test_a_rate_that_the_caller_knows_is_told_as_it_is(progress, lines, clock):
    """F1."""
    progress.report("extracting", 0, 100)
    clock.now += 30
    progress.report("extracting", 4, 100, "3.0 frames/s, held up by decoding")
    assert lines[-1] == "s4v extract: extracting: 4 of 100 rows, 3.0 frames/s, held up by decoding, about 12.0 min left"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (90, "1.5 min"), (7200, "2.0 h")])
def test_durations_have_the_unit_that_suits_them(seconds, text):
    from s4v.progress import describe_seconds

    assert describe_seconds(seconds) == text


@pytest.mark.parametrize(
    ("stage", "done", "elapsed_s", "text"),
    [
        ("scanning", 0, 10, ""),
        ("scanning", 30, 10, "3.0 videos/s"),
        ("measuring the codec: 1 videos", 1, 60, "1.0 frames/min"),
        ("embedding captions", 100, 10, "10.0 captions/s"),
    ],
)
def test_rates_count_what_the_stage_counts(stage, done, elapsed_s, text):
    from s4v.progress import describe_rate

    assert describe_rate(stage, done, elapsed_s) == text


def test_a_terminal_has_a_bar_without_markup(monkeypatch):
    """F1, C6: brackets in a stage's name are no colours."""
    from s4v.progress import show_progress

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress("extract", "loading the libraries") as report:
        report("calibrating the codec: [red]64[/] videos", 3, 64)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "[red]64[/] videos" in shown and "3/64" in shown


def test_a_log_that_takes_no_more_ends_nothing(monkeypatch):
    """F1: the disk of the log is full, or nobody reads the pipe."""
    from s4v.progress import show_progress

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with show_progress("scan", "listing") as report:
        report("scanning", 1, 2)


def count_frames(monkeypatch):
    counts = []
    encode = Backbone.encode_frames

    def encode_and_count(self, pixels, layers):
        counts.append(len(pixels))
        return encode(self, pixels, layers)

    monkeypatch.setattr(Backbone, "encode_frames", encode_and_count)
    return counts


@pytest.mark.parametrize("more", [[], ["--channels", "32"]])
def test_a_trial_of_one_frame_takes_few_frames_through_the_backbone(one_video_folder, tmp_path, monkeypatch, more):
    """F1: what a giant on a CPU takes a minute for."""
    counts = count_frames(monkeypatch)
    command = [*EXTRACT, "--dataset", "folder", "--root", one_video_folder, "--limit", "1", "--frames", "1", *more]
    result = run(*command, "--out", tmp_path / "s.zarr")
    assert "1 videos ok" in result.stdout
    assert sum(counts) <= 5, "two to fit, one to keep, two to measure"
    assert open_store(tmp_path / "s.zarr").codec.dtype == "int8"


def test_a_trial_takes_as_many_frames_as_its_codec_has_directions(one_video_folder, tmp_path, monkeypatch):
    """F1: 64 tokens a frame, 150 directions."""
    counts = count_frames(monkeypatch)
    command = [*EXTRACT, "--dataset", "folder", "--root", one_video_folder, "--limit", "1", "--frames", "1"]
    result = run(*command, "--channels", "150", "--out", tmp_path / "s.zarr")
    assert result.exit_code == 0, result.stderr
    assert sum(counts) == 11, "five to fit, for 300 tokens, one to keep, five to measure"


@pytest.mark.parametrize("num_frames", [3, 4, 8, 16])
@pytest.mark.parametrize("num_videos", [1, 5, 20, 64, 1000])
def test_the_sample_of_a_real_run_is_what_it_was(num_videos, num_frames):
    """F1."""
    expected = {1: 16, 5: 16, 20: 7, 64: 2, 1000: 2}[num_videos]
    assert frames_per_video(num_videos, make_layout(num_frames)) == frames_per_video(num_videos) == expected


@pytest.mark.parametrize(
    ("num_videos", "num_taken", "num_frames", "num_patches", "expected"),
    [
        (1, 64, 1, 256, 2),
        (1, 64, 2, 256, 4),
        (20, 64, 1, 256, 2),
        (1, 64, 1, 49, 11),
        (20, 1, 1, 49, 7),
        (64, 64, 1, 49, 2),
    ],
)
def test_a_trials_sample_is_small_whatever_its_limit(num_videos, num_taken, num_frames, num_patches, expected):
    """F1."""
    layout = make_layout(num_frames, num_patches=num_patches, channels=256)
    assert frames_per_video(num_videos, layout, num_taken) == expected


@pytest.mark.parametrize("channels", [1, 8, 30])
def test_few_tokens_have_the_basis_of_their_covariance(channels):
    """F1: with far less to compute."""
    tokens = np.random.default_rng(0).normal(size=(31, 100)) * np.linspace(3, 0.1, 100) + 5
    mean = tokens.mean(axis=0)
    expected = codec.fit_basis(np.cov(tokens.T, bias=True), channels)
    np.testing.assert_allclose(codec.fit_basis_of_few(tokens, mean, channels), expected, atol=1e-6)


def make_layout(num_frames, num_patches=256, channels=256):
    return StoreLayout(
        num_rows=1,
        num_views=1,
        num_frames=num_frames,
        layers=(0,),
        num_patches=num_patches,
        width=1792,
        channels=channels,
        embed_dim=8,
        image_size=(224, 224),
        patch_dtype="int8",
        keep_bits=None,
        with_pixels=True,
    )
