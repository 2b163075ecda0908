import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s4v.backbone.vision_tower import FrameTokens, build_backbone
from s4v.errors import (
    ConfigError,
    EnvironmentFailedError,
    NoGoodVideoError,
    StoreExistsError,
    StoreMismatchError,
)
from s4v.extract import disk_space, extraction, job
from s4v.extract.batching import batch_slots
from s4v.extract.extraction import extract_dataset
from s4v.extract.meter import Meter, StageClock
from s4v.extract.pipeline import stages as pipeline
from s4v.extract.pipeline.batch_buffers import BatchBuffers
from s4v.extract.pipeline.batch_encoder import BatchCoder
from s4v.store.codecs.affine import AffineCodec, round_mantissas
from s4v.store.fidelity import measure_fidelity
from s4v.store.info import describe_store
from s4v.store.layout import StoreLayout
from s4v.store.reader import open_store
from s4v.store.writer import read_marker_state


@given(
    num_frames=st.lists(st.integers(1, 20), min_size=1, max_size=30), views=st.integers(1, 3), size=st.integers(1, 40)
)
def test_batches_hold_every_frame_once_in_order(num_frames, views, size):
    batches = batch_slots(num_frames, [views] * len(num_frames), size)
    slots = [slot for batch in batches for slot in batch]
    assert slots == sorted(slots)
    assert len(slots) == len(set(slots)) == views * sum(num_frames)
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == -(-len(slots) // size)
    assert max(sizes) - min(sizes) <= 1


def run_live(store, row):
    """Tokens of a shard's frames from a freshly built backbone, in the same batches as the extraction."""
    info = store.attributes["backbone"]
    backbone = build_backbone(info["name"], weights=info["weights"], device=torch.device("cpu")).load_weights()
    layout = store.layout
    rows = layout.shard_rows(row // layout.rows_per_shard)
    table = store.read_manifest(["status", "num_cached_frames", "split"]).to_pylist()
    frames = [store.attributes["frames"].get(table[r]["split"], store.attributes["frames"][""]) for r in rows]
    batches = batch_slots(frames, [1] * len(frames), info["batch_size"])
    found = {}
    for batch in batches:
        pixels = np.zeros((len(batch), *layout.image_size, 3), np.uint8)
        for slot, (place, _, frame) in enumerate(batch):
            if table[rows[place]]["status"] == "ok":
                pixels[slot] = store.read_clips([rows[place]], [[frame]], arrays=("pixels",)).pixels[0, 0, 0]
        tokens = backbone.encode_frames(torch.from_numpy(pixels), layout.layers)
        for slot, (place, _, frame) in enumerate(batch):
            patches = torch.stack([layer[slot] for layer in tokens.patches])
            found[rows[place], frame] = (patches.numpy(), tokens.cls[slot].numpy(), tokens.embedding[slot].numpy())
    return found


def test_cached_tokens_are_exactly_the_backbones_own(float_store):
    store = open_store(float_store)
    statuses = store.read_manifest(["status"])["status"].to_pylist()
    for row in (0, 5):
        assert statuses[row] == "ok"
        for (other, frame), (patches, cls, embedding) in run_live(store, row).items():
            if statuses[other] == "ok":
                clips = store.read_clips([other], [[frame]])
                assert np.array_equal(clips.patches[0, 0], patches)
                assert np.array_equal(clips.cls[0, 0], cls)
                assert np.array_equal(store.read_embeddings()[other, 0, frame], embedding)


def test_splits_cache_their_own_number_of_frames(float_store):
    table = open_store(float_store).read_manifest(["split", "num_cached_frames", "status"]).to_pylist()
    assert {(r["split"], r["num_cached_frames"]) for r in table if r["status"] == "ok"} == {("train", 6), ("val", 4)}


def test_broken_video_is_a_row_with_its_reason(float_store):
    rows = open_store(float_store).read_manifest().to_pylist()
    (broken,) = [row for row in rows if row["status"] != "ok"]
    assert broken["video_id"] == "train/walk/broken.mp4"
    assert broken["status"] == "failed"
    assert broken["reason"].startswith("unreadable: it is a text")
    assert broken["frame_indices"] is None


def test_int8_store_is_close_to_the_float_store(int8_store, float_store):
    coded, exact = open_store(int8_store), open_store(float_store)
    frames = [[0, 2, 3]]
    tokens = exact.read_clips([0], frames).patches
    clips = coded.read_clips([0], frames)
    assert clips.patches.dtype == np.int8
    assert clips.cls.dtype == np.float16
    decoded = coded.decode_patches(clips.patches)
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    error = np.linalg.norm(decoded - tokens, axis=-1) / np.linalg.norm(centred, axis=-1)
    assert np.median(error) < 0.02


def test_calibration_ignores_timing_and_limit(video_folder, tmp_path, make_config, int8_store):
    config = make_config(video_folder, tmp_path / "other.zarr", dtype="int8", num_decoders=1, limit=2)
    summary = extract_dataset(config)
    assert summary.videos["pending"] > 0
    assert open_store(config.out).codec.sha256 == open_store(int8_store).codec.sha256


def test_neighbours_do_not_change_a_videos_tokens_beyond_its_shard(video_folder, tmp_path, make_config, float_store):
    """The same videos without the broken one: shards of one row, so every row stands alone."""
    root = tmp_path / "videos"
    shutil.copytree(video_folder, root)
    (root / "train/walk/broken.mp4").unlink()
    extract_dataset(make_config(root, tmp_path / "clean.zarr"))
    clean, dirty = open_store(tmp_path / "clean.zarr"), open_store(float_store)
    place = {v: i for i, v in enumerate(dirty.read_manifest(["video_id"])["video_id"].to_pylist())}
    for row, video_id in enumerate(clean.read_manifest(["video_id"])["video_id"].to_pylist()):
        ours = clean.read_clips([row], [[0, 1, 2, 3]])
        theirs = dirty.read_clips([place[video_id]], [[0, 1, 2, 3]])
        assert np.array_equal(ours.patches, theirs.patches), video_id


def test_same_command_again_changes_nothing(float_store, video_folder, make_config, tmp_path):
    out = shutil.copytree(float_store, tmp_path / "s.zarr")  # a writer locks its store, and others read that one
    before = {p: p.stat().st_mtime_ns for p in out.rglob("c.*")}
    summary = extract_dataset(make_config(video_folder, out))
    assert summary.videos == {"ok": 10, "failed": 1, "pending": 0}
    assert {p: p.stat().st_mtime_ns for p in out.rglob("c.*")} == before


def test_limit_stops_early_and_the_next_run_goes_on(video_folder, tmp_path, make_config, float_store):
    config = make_config(video_folder, tmp_path / "part.zarr", limit=3)
    assert extract_dataset(config).videos == {"ok": 3, "failed": 0, "pending": 8}
    assert extract_dataset(replace(config, limit=None)).videos == {"ok": 10, "failed": 1, "pending": 0}
    assert_same_store(config.out, float_store)


def assert_same_store(path, expected):
    names = sorted(p.relative_to(expected) for p in expected.rglob("*") if p.is_file())
    assert sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file()) == names
    for name in names:
        if name.name in ("stats.json", "checksums.json", "joined.arrows") or name.as_posix() == "zarr.json":
            continue  # times and dates
        assert (path / name).read_bytes() == (expected / name).read_bytes(), name


def test_killed_run_continues_to_the_same_store(video_folder, tmp_path, make_config, float_store):
    config = make_config(video_folder, tmp_path / "killed.zarr")
    code = (
        "import sys; from pathlib import PosixPath\n"
        "from s4v.extract.config import ExtractConfig; from s4v.extract.extraction import extract_dataset\n"
        f"extract_dataset({config!r})"
    )
    victim = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not list(config.out.glob("_parts/[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert list(config.out.glob("_parts/[0-9]*"))
    extract_dataset(config)
    assert_same_store(config.out, float_store)


class LateBuffers(BatchBuffers):
    """As beside a GPU, at its worst: results are copied when they are read, pixels are gone after the upload."""

    def upload(self, size):
        return super().upload(size).clone()

    def download(self, results):
        self.under_way = results
        self.pixels[:] = 255

    def read(self):
        super().download(self.under_way)
        return super().read()


@pytest.mark.parametrize("num_ahead", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_batches_that_are_under_way_together_do_not_mix(
    num_ahead, video_folder, make_config, tmp_path, monkeypatch, contents
):
    """Shards of one video and of two batches, and a batch of a failed video alone."""
    plain = make_config(video_folder, tmp_path / "plain.zarr", batch_size=4)
    extract_dataset(plain)
    monkeypatch.setattr(pipeline, "BatchBuffers", LateBuffers)
    monkeypatch.setattr(pipeline, "batches_ahead", lambda _: num_ahead)
    late = replace(plain, out=tmp_path / "late.zarr")
    extract_dataset(late)
    assert contents(late.out, "zarr.json") == contents(plain.out, "zarr.json")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA GPU")
def test_what_is_copied_beside_the_work_on_a_gpu_is_what_was_waited_for(
    video_folder, make_config, tmp_path, monkeypatch, contents
):
    beside = make_config(video_folder, tmp_path / "beside.zarr", batch_size=4, device="cuda", dtype="int8")
    extract_dataset(beside)
    monkeypatch.setattr(pipeline, "batches_ahead", lambda _: 0)
    waited = replace(beside, out=tmp_path / "waited.zarr")
    extract_dataset(waited)
    assert contents(beside.out, "zarr.json") == contents(waited.out, "zarr.json")


def test_results_land_in_memory_that_is_used_again(monkeypatch):
    """The way of a CUDA GPU's results, without one."""
    arrival = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    buffers = BatchBuffers(torch.device("cpu"), 4, (8, 8))
    monkeypatch.setattr(buffers, "_arrival", arrival)
    first, second = torch.arange(8.0).reshape(4, 2), torch.arange(4).reshape(2, 2) + 20.0
    buffers.download({"x": first})
    found = buffers.read()["x"]
    assert np.array_equal(found, first)
    buffers.download({"x": second})
    assert np.array_equal(buffers.read()["x"], second), "a shorter batch"
    assert np.array_equal(found[:2], second) and np.array_equal(found[2:], first[2:])


class GivenTokens:
    """A backbone that gives the tokens it is told to give."""

    device = torch.device("cpu")
    info = SimpleNamespace(depth=6)

    def __init__(self, patches):
        cls, embedding = torch.zeros(len(patches[0]), len(patches), 8), torch.zeros(len(patches[0]), 4)
        self.tokens = FrameTokens(patches, cls, embedding)

    def encode_frames(self, pixels, layers):
        return self.tokens


def code_tokens(patches, codec, **sizes):
    backbone = GivenTokens(patches)
    layout = StoreLayout(
        num_rows=1, num_views=1, num_frames=3, layers=(2, 5), num_patches=4, width=8, channels=8, embed_dim=4,
        image_size=(8, 8), patch_dtype=codec.dtype, **sizes,
    )  # fmt: skip
    coder = BatchCoder(backbone, codec, layout)
    results = {name: values.numpy() for name, values in coder.code(backbone.tokens).items()}
    return coder.finish(results), results, lambda: coder.raise_for(torch.zeros(3, 8, 8, 3), ["a", "b"])


def test_a_number_that_is_none_is_found_once_a_batch_and_named():
    scale = np.ones((2, 8), np.float32)
    for value in (float("nan"), float("inf")):
        patches = [torch.ones(3, 4, 8), torch.ones(3, 4, 8)]
        patches[1][1, 2, 3] = value
        for codec in (AffineCodec(dtype="int8", scale=scale), AffineCodec(dtype="float32")):
            is_finite, _, raise_for = code_tokens(patches, codec)
            assert not is_finite
            with pytest.raises(EnvironmentFailedError, match="block 5 produced NaN or infinity on b"):
                raise_for()
    is_finite, _, raise_for = code_tokens([torch.ones(3, 4, 8)] * 2, AffineCodec(dtype="float32"))
    assert is_finite
    with pytest.raises(EnvironmentFailedError, match="from a to b, and none when it ran on it again"):
        raise_for()


def test_rounding_to_few_bits_may_not_end_in_infinity():
    """Two bits: 57,344 is the largest, and from 61,440 on the next one up is none."""
    for reach, holds in ((61_000.0, True), (63_000.0, False)):
        patches = [torch.ones(3, 4, 8), torch.full((3, 4, 8), reach)]
        is_finite, results, raise_for = code_tokens(patches, AffineCodec(dtype="float16"), keep_bits=2)
        assert is_finite == holds == bool(np.isfinite(results["patches"]).all())
    with pytest.raises(EnvironmentFailedError, match=r"block 5 .*65504.*--dtype float32"):
        raise_for()


def test_videos_that_are_unmounted_stop_the_run(video_folder, make_config, tmp_path, float_store, contents):
    root = shutil.copytree(video_folder, tmp_path / "videos")
    config = make_config(root, tmp_path / "s.zarr", num_decoders=1)

    def unmount(stage, done, *_):
        if stage == "extracting" and done == 2:
            root.rename(tmp_path / "elsewhere")
            root.mkdir()  # the mount point

    with pytest.raises(EnvironmentFailedError, match="is gone, with all its videos .unmounted.*run the same command"):
        extract_dataset(config, unmount)
    root.rmdir()
    (tmp_path / "elsewhere").rename(root)
    assert len(list(config.out.glob("_parts/[0-9]*.arrows"))) >= 2
    extract_dataset(config)
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")


def test_a_store_is_not_replaced_by_one_that_does_not_fit(
    float_store, video_folder, make_config, tmp_path, monkeypatch, contents
):
    out = shutil.copytree(float_store, tmp_path / "old.zarr")
    before, size = contents(out), sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    config = make_config(video_folder, out, overwrite=True)
    monkeypatch.setattr(disk_space, "free_bytes", lambda _: 1000)
    with pytest.raises(ConfigError, match=r"1\.0 kB free and .* MB in the store that would be replaced. Nothing was"):
        extract_dataset(replace(config, layers="all", frames={"": 60}))
    assert contents(out) == before
    needed = size * 1.2  # a failed video might be good by now
    monkeypatch.setattr(
        disk_space, "free_bytes", lambda path: needed if not list(path.glob("_parts/*")) else needed - size
    )
    assert extract_dataset(config).videos["ok"] == 10, "with the old store's own room there is enough"


def test_a_worker_does_a_run_of_shards_once(
    video_folder, make_config, tmp_path, float_store, contents, worker_job, hand_out
):
    config = make_config(video_folder, tmp_path / "s.zarr", prepare=True)
    extract_dataset(config)
    config = replace(config, prepare=False)
    undone = hand_out(config, dict.fromkeys(range(11)))
    with worker_job(config) as worker:
        assert worker.process(undone)["backbone"] > 0
        times = {path: path.stat().st_mtime_ns for path in config.out.glob("_parts/*")}
        assert len(times) == 11
        assert "backbone" not in worker.process(undone), "somebody has done them all"
        again = worker.process({**undone, **hand_out(config, {3: read_marker_state(config.out, 3)})})
        assert "backbone" not in again and "waiting for the writer" in again, "good rows are copied"
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"000003.arrows"}
    extract_dataset(config)
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")


def test_while_workers_run_their_parent_holds_no_weights(video_folder, make_config, tmp_path, monkeypatch):
    built, seen = [], []
    build = job.build_backbone
    monkeypatch.setattr(job, "build_backbone", lambda *args, **kwargs: built.append(build(*args, **kwargs)) or built[0])

    def work(_, shards, report, *__):
        seen.append(built[0].has_weights)
        for shard in shards:
            report(shard, {"backbone": 2.0, "start": 5.0})

    monkeypatch.setattr(extraction, "run_on_workers", work)
    config = make_config(video_folder, tmp_path / "s.zarr", num_workers=2)
    extract_dataset(config)
    assert seen == [False]
    stats = json.loads((config.out / "stats.json").read_text())
    assert stats["flops_per_frame"] > 1e8 and stats["flop_utilisation"] is None
    assert stats["seconds_by_stage"]["backbone"] == 22


def test_progress_says_which_share_of_a_gpus_peak_is_used(float_store):
    told = []
    meter = Meter(
        layout=open_store(float_store).layout,
        passes=[6] * 11,
        total=11,
        flops_per_frame=10**9,
        peak_flops=1e12,
        clock=StageClock({"backbone": 3.0}),
        report=lambda *facts: told.append(facts),
    )
    meter.count(0, worker_seconds=0.03)
    meter.count(1, worker_seconds=0.01)
    assert meter.flop_utilisation == pytest.approx(12e9 / 0.04e12), (
        "of two workers' devices, whatever the time together"
    )
    assert "at 30% of the GPU's peak, held up by backbone" in told[-1][3]


def test_stats_say_how_fast_it_was_and_what_held_it_up(video_folder, make_config, tmp_path):
    told = []
    config = make_config(video_folder, tmp_path / "s.zarr", dtype="float32")
    extract_dataset(config, lambda *facts: told.append(facts))
    stats = json.loads((config.out / "stats.json").read_text())
    assert (stats["videos"], stats["frames"]) == (11, 9 * 6 + 2 * 4)
    assert 0 < stats["frames"] / stats["frames_per_second"] <= stats["seconds"]
    assert stats["bottleneck"] in ("decoding", "backbone", "writing")
    assert stats["flops_per_frame"] > 1e8 and stats["flop_utilisation"] is None, "a CPU's peak is not known"
    assert told[-1][:3] == ("extracting", 11, 11) and "frames/s, held up by" in told[-1][3]
    before = (config.out / "stats.json").read_bytes()
    extract_dataset(config)
    assert (config.out / "stats.json").read_bytes() == before, "a run that had nothing to do"


def test_other_settings_on_an_existing_store_are_refused_with_the_differences(float_store, video_folder, make_config):
    with pytest.raises(StoreMismatchError) as caught:
        extract_dataset(make_config(video_folder, float_store, dtype="int8", batch_size=4, layers="1,3", seed=3))
    message = str(caught.value)
    for part in (
        "layout.patch_dtype float32 there, int8 here",
        "backbone.batch_size 16 there, 4 here",
        "backbone.weights_sha256 ",
        "layout.layers [0, 1, 2, 3, 4, 5] there",
    ):
        assert part in message


def test_data_that_moved_is_the_same_data(float_store, video_folder, tmp_path, make_config):
    shutil.copytree(video_folder, tmp_path / "elsewhere")
    shutil.copytree(float_store, tmp_path / "copy.zarr")
    summary = extract_dataset(make_config(tmp_path / "elsewhere", tmp_path / "copy.zarr"))
    assert summary.videos == {"ok": 10, "failed": 1, "pending": 0}


def test_new_videos_are_refused(float_store, video_folder, tmp_path, make_config, make_video):
    root = tmp_path / "videos"
    shutil.copytree(video_folder, root)
    make_video(root / "val/run/new.mp4")
    copied = tmp_path / "copy.zarr"
    shutil.copytree(float_store, copied)
    with pytest.raises(StoreMismatchError, match=r"1 \(val/run/new\.mp4\) videos are new"):
        extract_dataset(make_config(root, copied))


def test_foreign_folder_is_refused_before_any_work(video_folder, tmp_path, make_config):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreExistsError, match="exists and is not a store"):
        extract_dataset(make_config(video_folder, tmp_path, model="no such model"))


def test_not_one_good_video_is_an_error(tmp_path, make_config):
    (tmp_path / "v/train/a").mkdir(parents=True)
    (tmp_path / "v/train/a/x.mp4").write_text("no")
    with pytest.raises(NoGoodVideoError, match="not one of 1 videos decodes.*First reasons: unreadable"):
        extract_dataset(make_config(tmp_path / "v", tmp_path / "s.zarr", dtype="int8"))
    assert not (tmp_path / "s.zarr").exists(), "nothing to calibrate on, nothing written"
    with pytest.raises(NoGoodVideoError, match="not one of 1 videos decodes"):
        extract_dataset(make_config(tmp_path / "v", tmp_path / "s.zarr"))


def test_class_token_that_overflows_float16_stops_the_run(video_folder, tmp_path, make_config):
    import open_clip
    from safetensors.torch import save_file

    from s4v.backbone.open_clip_models import resolve_model
    from s4v.errors import EnvironmentFailedError

    resolve_model("tiny-clip")  # makes our configurations known to open_clip
    state = open_clip.create_model("tiny-clip", pretrained=None).state_dict()
    state["visual.ln_pre.weight"][5] = 3e7
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "big.safetensors")
    config = make_config(video_folder, tmp_path / "s.zarr", weights=str(tmp_path / "big.safetensors"), dtype="int8")
    with pytest.raises(EnvironmentFailedError, match=r"block 0 reach .* above float16's 65504.*--dtype float32"):
        extract_dataset(config)
    assert extract_dataset(replace(config, dtype="float32", out=tmp_path / "f.zarr")).videos["ok"] == 10


def test_without_a_good_training_video_others_calibrate(tmp_path, make_config, make_video):
    make_video(tmp_path / "v/val/a/good.mp4")
    (tmp_path / "v/train/a").mkdir(parents=True)
    (tmp_path / "v/train/a/bad.mp4").write_text("no video")
    summary = extract_dataset(make_config(tmp_path / "v", tmp_path / "s.zarr", dtype="int8"))
    assert summary.videos == {"ok": 1, "failed": 1, "pending": 0}


def test_absurd_length_in_a_container_costs_only_its_video(tmp_path, make_config, make_video):
    import av

    make_video(tmp_path / "v/train/a/good.mp4")
    with av.open(str(tmp_path / "v/train/a/long.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for tick in (0, 1, 2, 200_000_000):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    summary = extract_dataset(make_config(tmp_path / "v", tmp_path / "s.zarr"))
    assert summary.videos["ok"] + summary.videos["failed"] == 2
    assert summary.videos["ok"] >= 1


def test_options_out_of_range_are_refused_before_any_work(video_folder, tmp_path, make_config):
    for changes, message in (
        ({"sampling": "sparse"}, "--sampling takes uniform, reference-k400, .*; found 'sparse'"),
        ({"resize": "300"}, "--resize takes 256, 256x320, 224, whole; found '300'"),
        ({"views": {"": "ten"}}, "--views takes centre, flip, three, augment:N; found 'ten'"),
        ({"dataset": "ssv2", "views": {"": "flip"}}, "--views flip would turn left into right"),
        ({"sampling": "reference-retrieval", "clips": {"": 3}}, "reference-retrieval has one clip; found --clips 3"),
        ({"dtype": "int4"}, "--dtype takes int8, float16, float32; found 'int4'"),
        ({"batch_size": 0}, "--batch-size must be at least 1; found 0"),
        ({"decode_timeout_s": 0.0}, "--decode-timeout takes seconds above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(video_folder, tmp_path / "x.zarr", **changes)
    with pytest.raises(ConfigError, match=r"--layers must lie in 0 to 5 for this model; found \[9\]"):
        extract_dataset(make_config(video_folder, tmp_path / "x.zarr", layers="1,9"))
    with pytest.raises(ConfigError, match="--frames names train, but there is a split 'val'"):
        extract_dataset(make_config(video_folder, tmp_path / "x.zarr", frames={"train": 4}))
    assert not list(tmp_path.iterdir())


def test_store_without_pixels(video_folder, tmp_path, make_config):
    extract_dataset(make_config(video_folder, tmp_path / "n.zarr", with_pixels=False, limit=1))
    store = open_store(tmp_path / "n.zarr")
    assert store.read_clips([0], [[0]]).pixels is None
    with pytest.raises(StoreMismatchError, match="has no array 'pixels'"):
        store.read_clips([0], [[0]], arrays=("pixels",))


def test_real_files_make_a_store(real_videos, tmp_path, make_config):
    summary = extract_dataset(make_config(real_videos, tmp_path / "real.zarr", frames={"": 8}))
    assert summary.videos == {"ok": 10, "failed": 1, "pending": 0}
    (failed,) = summary.failed
    assert failed == {
        "video_id": "real/corrupted.mp4",
        "path": "real/corrupted.mp4",
        "reason": "truncated: 28 of 50 frames decode",
    }


@pytest.fixture(scope="module")
def projected_store(video_folder, tmp_path_factory, make_config):
    out = tmp_path_factory.mktemp("projected") / "k24.zarr"
    extract_dataset(make_config(video_folder, out, dtype="int8", channels=24))
    return out


def test_projected_tokens_lose_what_the_store_says_they_lose(projected_store, float_store):
    coded, exact = open_store(projected_store), open_store(float_store)
    fidelity = describe_store(coded)["fidelity"]
    clips = coded.read_clips([0, 5], [[0, 2, 3]] * 2)
    assert clips.patches.shape[-1] == 24
    tokens, decoded = exact.read_clips([0, 5], [[0, 2, 3]] * 2).patches, coded.decode_patches(clips.patches)
    assert len(fidelity["layers"]) == len(coded.layout.layers)
    for place, told in enumerate(fidelity["layers"]):
        assert told["layer"] == coded.layout.layers[place]
        found = measure_fidelity(tokens[:, :, place], decoded[:, :, place], told["layer"])
        assert found.variance_kept == pytest.approx(told["variance_kept"], abs=0.05)
        assert 0.3 < told["variance_kept"] < 1


def test_the_codecs_cost_is_measured_on_videos_it_was_not_fitted_on(int8_store, video_folder, tmp_path, make_config):
    told = describe_store(open_store(int8_store))["fidelity"]
    assert told["is_held_out"] and told["videos"] == 2, "the 8 good training videos are calibration's"
    assert all(one["error_median"] < 0.03 for one in told["layers"])
    extract_dataset(make_config(video_folder, tmp_path / "train.zarr", dtype="int8", splits=("train",)))
    told = describe_store(open_store(tmp_path / "train.zarr"))["fidelity"]
    assert not told["is_held_out"]


def test_float_codes_need_no_calibration_and_exact_ones_no_measuring(float_store):
    assert describe_store(open_store(float_store))["fidelity"] is None


def test_a_codec_can_be_shared(projected_store, video_folder, tmp_path, make_config):
    config = make_config(video_folder, tmp_path / "again.zarr", dtype="int8", codec_from=projected_store, seed=0)
    extract_dataset(config)
    ours, theirs = open_store(config.out), open_store(projected_store)
    assert ours.codec.sha256 == theirs.codec.sha256
    assert np.array_equal(ours.read_clips([0], [[0, 1]]).patches, theirs.read_clips([0], [[0, 1]]).patches)
    told = [describe_store(store)["fidelity"] for store in (ours, theirs)]
    assert told[0] == told[1], "measured on what the other store's fit has not seen"


def test_a_codec_for_other_tokens_is_refused(projected_store, video_folder, tmp_path, make_config):
    config = make_config(
        video_folder, tmp_path / "other.zarr", dtype="float16", codec_from=projected_store, layers="1,3", channels=12
    )
    with pytest.raises(StoreMismatchError) as caught:
        extract_dataset(config)
    for part in ("dtype int8 there, float16 here", "there, (1, 3, 5) here", "channels 24 there, 12 here"):
        assert part in str(caught.value)
    assert not config.out.exists()


def test_kept_bits_make_a_smaller_store(video_folder, tmp_path, make_config, float_store):
    config = make_config(video_folder, tmp_path / "rounded.zarr", dtype="float16", keep_bits=3)
    extract_dataset(config)
    facts = describe_store(open_store(config.out))
    whole = describe_store(open_store(float_store))["arrays"]["patches"]["bytes"] / 2
    assert facts["arrays"]["patches"]["bytes"] < 0.7 * whole
    tokens = open_store(float_store).read_clips([0], [[0, 3]]).patches.astype(np.float16)
    assert np.array_equal(open_store(config.out).read_clips([0], [[0, 3]]).patches, round_mantissas(tokens, 3))
    assert [one["layer"] for one in facts["fidelity"]["layers"]] == facts["layers"]


def test_impossible_codecs_are_refused_before_anything_is_written(video_folder, tmp_path, make_config):
    out = tmp_path / "none.zarr"
    with pytest.raises(ConfigError, match="--channels 193 is more than the 192 channels of tiny-clip"):
        extract_dataset(make_config(video_folder, out, channels=193))
    with pytest.raises(ConfigError, match=r"--channels 0|--channels must be at least 1"):
        make_config(video_folder, out, channels=0)
    with pytest.raises(ConfigError, match="--keep-bits takes 1 to 9 .* found 3 with --dtype int8"):
        make_config(video_folder, out, dtype="int8", keep_bits=3)
    assert not out.exists()


def test_too_few_tokens_for_a_projection_are_refused(make_video, tmp_path, make_config):
    make_video(tmp_path / "videos/a/0.mp4", num_frames=2)
    config = make_config(tmp_path / "videos", tmp_path / "few.zarr", dtype="int8", channels=150, calibration_videos=1)
    with pytest.raises(ConfigError, match=r"--channels 150 wants more than 150 tokens .* 1 videos have"):
        extract_dataset(config)
    assert not config.out.exists()
