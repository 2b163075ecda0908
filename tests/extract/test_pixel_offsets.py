"""`--pixel-offsets`: pixels around each cached frame, which change nothing of its tokens."""

import json
import shutil
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract.decode import pool as pools
from s4v.extract.decode import worker
from s4v.extract.decode.pool import DecodeRequest, DecoderPool
from s4v.extract.decode.video_file import decord
from s4v.extract.decode.worker import LastVideo, decode
from s4v.extract.extraction import extract_dataset
from s4v.extract.plan import plan_command
from s4v.extract.recipe import describe_recipe, settle_recipe
from s4v.extract.target import Target
from s4v.pages import draw_strip
from s4v.store.info import describe_store, render_info
from s4v.store.merge import merge_stores
from s4v.store.offsets import SEEN_FRAME, describe_offsets, parse_offsets
from s4v.store.reader import open_store
from s4v.store.verify import verify_store
from s4v.train.clips import ClipLoader, find_labelled_rows, plan_training_epoch, require_whole_steps
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.networks import NETWORKS
from s4v.train.networks.contract import Network, NetworkKind
from s4v.train.recipe import Recipe

OFFSETS = "-2..2,0.5step"
ARRAYS = ("patches", "cls", "embedding")


@pytest.fixture(scope="module")
def offset_store(video_folder, build_once, make_config):
    """A float32 store of `video_folder` with neighbours and half steps. Read it, do not change it."""
    make = lambda root: extract_dataset(  # noqa: E731
        make_config(video_folder, root / "offsets.zarr", pixel_offsets=parse_offsets(OFFSETS))
    )
    return build_once("offsets", make) / "offsets.zarr"


def ask(path, **changes):
    values = dict(
        num_frames=4, sampling="uniform", resize="224", image_size=(32, 32), decoder="auto", start_s=None, end_s=None
    )
    return {"path": str(path), **values, **changes}


def run(path, last_video=None, **changes):
    return decode(ask(path, **changes), lambda _: None, last_video)


def good_rows(store):
    """Row, views and frames of each."""
    table = store.read_manifest(["status", "num_views", "num_cached_frames"]).to_pylist()
    return [(row, *list(one.values())[1:]) for row, one in enumerate(table) if one["status"] == "ok"]


def test_tokens_are_those_of_a_plain_store_to_the_bit(offset_store, float_store):
    store, plain = open_store(offset_store), open_store(float_store)
    assert describe_offsets(store.layout.pixel_offsets) == OFFSETS
    columns = ["video_id", "status", "reason", "frame_indices", "timestamps_s", "views", "eval_clips", "source_hash"]
    assert store.read_manifest(columns).equals(plain.read_manifest(columns))
    assert len(good_rows(store)) == 10
    for row in good_rows(store):
        ours, theirs = store.read_row(*row), plain.read_row(*row)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ARRAYS)
        assert np.array_equal(ours["pixels"][:, :, [store.layout.seen_offset]], theirs["pixels"])
    assert (store.codec.sha256, verify_store(store)) == (plain.codec.sha256, [])


def test_what_stands_under_pixels_are_the_frames_of_the_file(offset_store, video_folder):
    """Read by zarr-python alone, and compared with a plain decoding of all frames."""
    store, pixels = open_store(offset_store), zarr.open_group(offset_store, mode="r")["pixels"]
    table = store.read_manifest(["path", "num_frames", "frame_indices"]).to_pylist()
    for row, _, num_frames in good_rows(store):
        count, indices = table[row]["num_frames"], table[row]["frame_indices"]
        facts, every = run(video_folder / table[row]["path"], num_frames=count, resize="256", image_size=(64, 64))
        assert facts["frame_indices"] == list(range(count)) and every.shape[1:3] == (count, 1)
        for place, index in enumerate(indices):
            half = (2 * place + 2) * count // (2 * num_frames)
            wanted = np.clip([*range(index - 2, index + 3), half], 0, count - 1)
            assert np.array_equal(pixels[row, 0, place], every[0, wanted, 0])


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_both_decoders_give_the_same_neighbours(tmp_path, make_video, decoder):
    if decoder == "decord" and decord is None:
        pytest.skip("decord has no wheel for this system")
    path = make_video(tmp_path / "v.mp4", num_frames=60, gop=12)
    _, every = run(path, num_frames=60, decoder="pyav")
    facts, pixels = run(path, num_frames=2, decoder=decoder, pixel_offsets=(-2, -1, 0, 1, 2, "0.25step"))
    assert (facts["decoder"], facts["frame_indices"]) == (decoder, [15, 45])
    assert facts["eval_clips"] == [[0, 1]] and len(facts["timestamps_s"]) == 2
    wanted = [[13, 14, 15, 16, 17, 22], [43, 44, 45, 46, 47, 52]]
    assert np.array_equal(pixels[0], every[0, :, 0][wanted])


def test_clips_that_lie_between_each_other_keep_their_partners(make_frames, tmp_path):
    """Cached frames are sorted by time, whatever clip they are of; each one's pixels come with it."""
    folder = make_frames(tmp_path / "f", num_frames=12)
    facts, pixels = run(folder, num_frames=6, num_clips=2, pixel_offsets=(0, "0.5step"))
    grey = lambda values: np.rint((values.mean(axis=(-3, -2, -1)) - 10) / 20).astype(int)  # noqa: E731
    assert facts["frame_indices"] == [1, 3, 5, 7, 9, 11] and facts["eval_clips"] == [[0, 2, 4], [1, 3, 5]]
    assert grey(pixels[0, :, 0]).tolist() == facts["frame_indices"]
    assert grey(pixels[0, :, 1]).tolist() == [3, 5, 7, 9, 11, 11]


def test_ends_are_clamped_or_wrapped(make_frames, tmp_path):
    folder = make_frames(tmp_path / "f", num_frames=5)
    grey = lambda values: np.rint((values.mean(axis=(-3, -2, -1)) - 10) / 20).astype(int).tolist()  # noqa: E731
    _, pixels = run(folder, num_frames=5, pixel_offsets=(-2, 0, 2))
    assert grey(pixels[0]) == [[0, 0, 2], [0, 1, 3], [0, 2, 4], [1, 3, 4], [2, 4, 4]]
    _, pixels = run(folder, num_frames=5, pixel_offsets=(-2, 0, 2), pixel_edge="wrap")
    assert grey(pixels[0]) == [[3, 0, 2], [4, 1, 3], [0, 2, 4], [1, 3, 4], [2, 4, 4]]


def test_a_segment_is_as_a_file_of_its_own(make_video, tmp_path):
    """No pixel of a row lies outside of its segment; going on from one segment to the next stays right."""
    path = make_video(tmp_path / "v.mp4", num_frames=40, fps=10, gop=5)
    _, every = run(path, num_frames=40, decoder="pyav")
    last_video = LastVideo()
    for start, edge in ((0, "clamp"), (10, "clamp"), (20, "wrap"), (30, "wrap")):
        span = dict(start_s=start / 10, end_s=start / 10 + 1)
        facts, pixels = run(
            path, last_video, num_frames=5, decoder="pyav", pixel_offsets=(-3, 0, 3), pixel_edge=edge, **span
        )
        assert facts["frame_indices"] == [start + index for index in (1, 3, 5, 7, 9)]
        first = [-2 % 10, 0, 4] if edge == "wrap" else [0, 1, 4]
        first[1] = 1
        assert np.array_equal(pixels[0, 0], every[0, [start + index for index in first], 0])
        assert np.array_equal(pixels[0, -1], every[0, [start + 6, start + 9, start + 9], 0])


def test_a_frame_that_is_wanted_twice_is_rendered_once(make_video, tmp_path, monkeypatch):
    path, rendered = make_video(tmp_path / "v.mp4", num_frames=12), []
    render = worker.render_views
    monkeypatch.setattr(worker, "render_views", lambda *given: rendered.append(1) or render(*given))
    _, pixels = run(path, num_frames=12, views="three", pixel_offsets=(-2, -1, 0, 1, 2))
    assert pixels.shape == (3, 12, 5, 32, 32, 3) and len(rendered) == 12


def test_a_decoder_may_take_what_offsets_take(tmp_path, make_video, monkeypatch):
    limits = []
    monkeypatch.setattr(worker.MEMORY_LIMIT, "set", limits.append)
    path = make_video(tmp_path / "v.mp4")
    run(path, views="three")
    run(path, views="three", pixel_offsets=(-1, 0, 1))
    answer = 4 * 3 * 32 * 32 * 3
    assert limits[3] - limits[1] == 2 * 2 * answer


def test_decoded_videos_that_wait_are_bounded_by_bytes(monkeypatch):
    asked = DecodeRequest(
        path="v.mp4",
        num_frames=4,
        sampling="uniform",
        resize="224",
        image_size=(32, 32),
        views="three",
        pixel_offsets=(-1, 0),
    )
    assert asked.answer_bytes == 4 * 3 * 2 * 32 * 32 * 3
    taken = []

    def requests():
        for number in range(12):
            taken.append(number)
            yield asked

    def submit(self, request):
        future = Future()
        future.set_result(request)
        return future

    monkeypatch.setattr(DecoderPool, "submit", submit)
    for most, ahead in ((2**30, 5), (3 * asked.answer_bytes, 4), (1, 2)):
        monkeypatch.setattr(pools, "_AHEAD_BYTES", most)
        taken.clear()
        with DecoderPool(1) as pool:
            videos = pool.decode_ahead(requests())
            next(videos)
            assert len(taken) == ahead and sum(1 for _ in videos) == 11


def test_a_run_goes_on_with_the_offsets_of_its_store(offset_store, video_folder, make_config, tmp_path, contents):
    out = shutil.copytree(offset_store, tmp_path / "s.zarr")
    before = contents(out)
    config = make_config(video_folder, out)
    assert extract_dataset(config).videos["ok"] == 10 and contents(out) == before
    assert f"pixels at {OFFSETS} of each frame" in describe_recipe(config, Target.find(config))
    given = (
        r"layout.pixel_offsets \[-2, -1, 0, 1, 2, '0.5step'\] there, \[0, 1\] here; pixel_edge None there, wrap here"
    )
    with pytest.raises(StoreMismatchError, match=given):
        extract_dataset(replace(config, pixel_offsets=(0, 1), pixel_edge="wrap"))
    without = settle_recipe(replace(config, with_pixels=False), Target.find(config))
    assert without.cached_offsets == (SEEN_FRAME,)  # and `layout.with_pixels` is what differs


def test_a_damaged_offset_is_mended_and_parts_are_joined(
    offset_store, video_folder, make_config, tmp_path, contents, flip_byte
):
    out = shutil.copytree(offset_store, tmp_path / "s.zarr")
    flip_byte(out / "pixels/c.2.0.0.0.0.0.0", 3 * 64 * 64 * 3)  # the fourth chunk: at offset 1
    assert [one.shard for one in verify_store(open_store(out))] == [2]
    extract_dataset(make_config(video_folder, out, repair=True))
    assert contents(out) == contents(offset_store) and verify_store(open_store(out)) == []
    merge_stores([out, offset_store], tmp_path / "m.zarr")
    assert contents(tmp_path / "m.zarr") == contents(offset_store)


def test_rows_are_appended_with_the_offsets_that_are_there(
    offset_store, video_folder, make_config, make_video, tmp_path
):
    root = shutil.copytree(video_folder, tmp_path / "videos")
    make_video(root / "train/run/new.mp4", seed=70)
    out = shutil.copytree(offset_store, tmp_path / "s.zarr")
    extract_dataset(make_config(root, out, append=True))
    store, old = open_store(out), open_store(offset_store)
    assert store.layout.num_rows == 12 and verify_store(store) == []
    assert store.read_row(11, 1, 4)["pixels"].shape == (1, 4, 6, 64, 64, 3)
    assert np.array_equal(store.read_row(0, 1, 4)["pixels"], old.read_row(0, 1, 4)["pixels"])


def test_wrapping_is_recorded_and_told(video_folder, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "s.zarr", pixel_offsets=(-1, 0), pixel_edge="wrap", prepare=True)
    extract_dataset(config)
    store = open_store(config.out)
    assert (store.attributes["pixel_edge"], store.facts.pixel_edge) == ("wrap", "wrap")
    facts = describe_store(store)
    assert (facts["pixel_offsets"], facts["pixel_edge"]) == ([-1, 0], "wrap")
    assert "pixels    at -1,0 of each frame, edge wrap" in render_info(facts)


def test_plain_stores_say_nothing_new(float_store):
    store = open_store(float_store)
    assert "pixel_edge" not in store.attributes and store.attributes["layout"]["pixel_offsets"] == [0]
    assert not any(line.startswith("pixels") for line in render_info(describe_store(store)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_offsets": (1, 2)}, "must name 0, the frame that the backbone sees; found 1,2: add 0"),
        ({"pixel_offsets": (0, 1), "with_pixels": False}, "--no-pixels stores no frames, --pixel-offsets 0,1 several"),
        ({"pixel_edge": "mirror"}, "--pixel-edge takes clamp, wrap; found 'mirror'"),
        ({"pixel_offsets": (0,), "pixel_edge": "wrap"}, "--pixel-edge wrap has no effect without --pixel-offsets"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(video_folder, make_config, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(video_folder, tmp_path / "s.zarr", **changes)


def test_steps_want_a_sampling_that_has_them(video_folder, make_config, tmp_path, monkeypatch):
    from s4v.extract import config as configs

    monkeypatch.setattr(configs, "STEPPED_SAMPLINGS", frozenset({"uniform"}))
    with pytest.raises(ConfigError, match=r"0\.5step is a share of the distance .* --sampling dense does not keep"):
        make_config(video_folder, tmp_path / "s.zarr", sampling="dense", pixel_offsets=(0, "0.5step"))
    assert make_config(video_folder, tmp_path / "s.zarr", sampling="dense", pixel_offsets=(0, 1)).cached_offsets


def test_a_plan_counts_every_offset(video_folder, make_config, tmp_path):
    plain = plan_command(make_config(video_folder, tmp_path / "s.zarr"), videos=10)
    more = plan_command(make_config(video_folder, tmp_path / "s.zarr", pixel_offsets=(-1, 0, 1)), videos=10)
    assert more.bytes_by_array == {**plain.bytes_by_array, "pixels": 3 * plain.bytes_by_array["pixels"]}


def test_what_is_decoded_to_calibrate_has_no_neighbours(video_folder, make_config, tmp_path):
    """So the codec is that of a plain store; a scan asks for what an extraction does."""
    config = make_config(video_folder, tmp_path / "s.zarr", pixel_offsets=(-1, "0.5step", 0), pixel_edge="wrap")
    record = config.read_records()[0]
    asked = DecodeRequest.of(record, config, image_size=(64, 64))
    assert (asked.pixel_offsets, asked.pixel_edge) == ((-1, 0, "0.5step"), "wrap")
    assert DecodeRequest.of(record, config, image_size=(64, 64), num_frames=3).pixel_offsets == (0,)


def test_a_strip_shows_the_frames_that_the_backbone_saw(offset_store, float_store):
    row = good_rows(open_store(float_store))[0][0]
    assert draw_strip(open_store(offset_store), row, "x") == draw_strip(open_store(float_store), row, "x")


def test_the_command_line_reads_offsets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = "plan --model tiny-clip --videos 10 --frames 2 --device cpu --json"
    sizes = [
        json.loads(CliRunner().invoke(app, [*plan.split(), *more]).stdout.splitlines()[-1])["bytes_by_array"]["pixels"]
        for more in ((), ("--pixel-offsets=-1..1,0.5step",), ("--pixel-offsets", "-2..2"))
    ]
    assert sizes == [sizes[0], 4 * sizes[0], 5 * sizes[0]]
    for command in ("extract --model tiny-clip", "scan"):
        result = CliRunner().invoke(app, [*command.split(), *["--dataset", "folder", "--pixel-offsets", "1..3"]])
        assert result.exit_code != 0 and "must name 0" in result.output


class Differences(Network):
    """How bright the picture gets from the frame before each one to the one behind it."""

    arrays = ("pixels",)
    pixel_offsets = (-1, 0, 1)

    def __init__(self, num_classes):
        super().__init__()
        self.classifier = nn.Linear(9, num_classes)

    def forward(self, pixels, patches, cls, codec=None):
        assert pixels.shape[2:] == (3, 3, 64, 64)
        return self.classifier(pixels.mean(dim=(1, 4, 5)).flatten(1))


class Neighbours(NetworkKind):
    name = "neighbours"
    tasks = ("recognition",)
    reads = "pixels around each frame"
    network = Differences

    def find_recipe(self, task, width):
        return Recipe(1, 1e-3, warmup_epochs=0.0, batch_size=4)

    def plan(self, store, outputs, options, layers):
        return self.describe_shape(store, outputs, layers)

    def build(self, shape):
        return self.network(shape.num_classes)


@pytest.fixture
def neighbours(monkeypatch):
    monkeypatch.setitem(NETWORKS, "neighbours", Neighbours())


def train(store, out):
    return train_run(TrainConfig(features=store, out=out, epochs=1, batch_size=4, head="neighbours", device="cpu"))


def test_a_network_reads_its_offsets_of_a_store_that_has_more(offset_store, neighbours, tmp_path):
    store = open_store(offset_store)
    loader = ClipLoader.for_network(Differences(2), store, layers=store.layout.layers, device=torch.device("cpu"))
    (plan, *_) = plan_training_epoch(find_labelled_rows(store, "train"), num_frames=4, batch_size=3, seed=0, epoch=0)
    (batch,) = loader.load([plan])
    raw = np.stack(
        [
            store.read_row(row, 1, 6)["pixels"][0, places, 1:4]
            for row, places in zip(plan.rows, plan.places, strict=True)
        ]
    )
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (store.facts.backbone.mean, store.facts.backbone.std))
    np.testing.assert_allclose(batch.pixels, (np.moveaxis(raw, -1, -3) / 255 - mean) / std, atol=1e-5)
    assert loader.count_bytes(plan) == raw.nbytes
    train(offset_store, tmp_path / "run")
    assert list((tmp_path / "run").rglob("best.json"))


def test_a_network_on_a_store_without_its_offsets_is_told_before_anything_is_written(float_store, neighbours, tmp_path):
    with pytest.raises(StoreMismatchError, match=r"at offsets 0 .* missing -1,1\. .*--pixel-offsets=-1\.\.1"):
        train(float_store, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shares_of_a_step_want_whole_clips(offset_store, neighbours, tmp_path, monkeypatch):
    """Half a step of a cached clip of six frames is not half a step of four of them."""

    class Halves(Differences):
        pixel_offsets = (-1, 0, "0.5step")

    monkeypatch.setattr(Neighbours, "network", Halves)
    message = r"pixels at 0\.5step, .* have 6 frames, 4 were asked for\. Train with --frames 6"
    with pytest.raises(StoreMismatchError, match=message):
        train(offset_store, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    store, lengths = open_store(offset_store), np.array([4, 4])
    require_whole_steps(Halves(2), lengths, 4, store)
    require_whole_steps(Differences(2), lengths, 2, store)  # frames of the source are the same of any clip
