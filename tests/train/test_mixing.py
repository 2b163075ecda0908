"""Mixing of clips: what is drawn, who is mixed with whom, what comes out, and trainings with it."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from s4v.errors import ConfigError, RunExistsError, StoreDamagedError
from s4v.store.codecs.affine import AffineCodec
from s4v.store.codecs.contract import Codec
from s4v.store.reader import open_store
from s4v.train.bad_rows import BadRows
from s4v.train.clips import ClipBatch, ClipLoader, ClipPlan, LabelledRows, plan_training_epoch
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.mixing import MixedLabels, Mixer, Mixing, codec_after, pair_clips
from s4v.train.recipe import classification_loss
from s4v.train.run_folder import open_run, read_metrics
from s4v.train.scorer import Scorer
from s4v.train.sweep import sweep_heads
from s4v.train.tasks import recognition as tasks

CPU = torch.device("cpu")
GRID, PATCH = (3, 4), (2, 5)
"""Neither is square."""
KINDS = ("mixup", "cutmix", "both")


class CubeCodec(Codec):
    """Codes are cube roots of tokens: no linear map."""

    name = "cube"

    @classmethod
    def part_shapes(cls, layout):
        return {}

    def encode(self, tokens, layer):
        return (tokens.abs() ** (1 / 3) * tokens.sign()).to(torch.float32)

    def decode(self, codes, layer):
        return codes.float() ** 3


def make_codec(name, layers=2, channels=4, width=6):
    generator = np.random.default_rng(5)
    mean = torch.from_numpy(generator.normal(size=(layers, width)).astype(np.float32))
    rows = [np.linalg.qr(generator.normal(size=(width, width)))[0][:channels] for _ in range(layers)]
    basis = torch.from_numpy(np.stack(rows).astype(np.float32))
    scale = torch.from_numpy(generator.uniform(0.1, 0.2, (layers, channels)).astype(np.float32))
    return {
        "int8": lambda: AffineCodec(dtype="int8", mean=mean, basis=basis, scale=scale),
        "float16": lambda: AffineCodec(dtype="float16"),
        "float32": lambda: AffineCodec(dtype="float32", mean=mean),
        "cube": lambda: CubeCodec(dtype="float32"),
    }[name]()  # fmt: skip


def make_mixing(kind="both", seed=0, epoch=0):
    return Mixing(kind=kind, mixup_alpha=0.8, cutmix_alpha=1.0, seed=seed, epoch=epoch)


def make_rows(count, num_views=1):
    one = np.ones(count, dtype=np.int64)
    return LabelledRows(7 + np.arange(count), np.arange(count), 4 * one, num_views * one, [[[0, 1, 2, 3]]] * count)


def make_batch(num_clips, codec, offsets=1, dense=1, seed=0):
    """T = 3 frames of two layers, of which pixels have `dense` as many; one row and column of pixels is no patch's."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tokens = draw(num_clips, 3, 2, 12, 6)
    patches = torch.stack([codec.encode(tokens[:, :, place], place) for place in range(2)], dim=2)
    size = (3, GRID[0] * PATCH[0] + 1, GRID[1] * PATCH[1] + 1)
    pixels = draw(num_clips, 3 * dense, *((offsets,) if offsets > 1 else ()), *size)
    return ClipBatch(pixels, patches, draw(num_clips, 3, 2, 6), torch.arange(num_clips) + 50)


def plan_of(partners, num_read, mixing):
    rows = np.arange(num_read)
    return ClipPlan(rows, rows % 2, np.zeros((num_read, 3), int), rows, partners=np.asarray(partners), mixing=mixing)


def copy(batch):
    return replace(batch, pixels=batch.pixels.clone(), patches=batch.patches.clone(), cls=batch.cls.clone())


def decode(codec, patches):
    return torch.stack([codec.decode(patches[:, :, place], place) for place in range(patches.shape[2])], dim=2)


@pytest.mark.parametrize(("offsets", "dense"), [(1, 1), (5, 1), (1, 2)])
@pytest.mark.parametrize("coded", ["int8", "float16", "float32", "cube"])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_clips_are_what_brute_force_makes_of_decoded_ones(kind, coded, offsets, dense):
    codec, mixing = make_codec(coded), make_mixing(kind, seed=1)
    plan = plan_of([1, 0, 4, 2], 5, mixing)
    batch = make_batch(5, codec, offsets, dense)
    mixer = Mixer(GRID, PATCH, codec if mixing.decodes(codec) else None)
    found = mixer.mix(copy(batch), plan, torch.from_numpy)
    tokens, draws = decode(codec, batch.patches), mixing.draw(plan.rows[:4], plan.views[:4], GRID)
    seen = decode(codec_after(codec, mixing), found.patches)
    assert found.patches.shape[0] == found.cls.shape[0] == found.pixels.shape[0] == 4
    for clip, (partner, share) in enumerate(zip(plan.partners, draws.shares.tolist(), strict=True)):
        for patch in range(12):
            down, across = divmod(patch, GRID[1])
            own = float(draws.maps[clip, down, across])
            expected = own * tokens[clip, :, :, patch] + (1 - own) * tokens[partner, :, :, patch]
            torch.testing.assert_close(seen[clip, :, :, patch], expected, rtol=1e-3, atol=0.01)
            top, left = down * PATCH[0], across * PATCH[1]
            box = (..., slice(top, top + PATCH[0]), slice(left, left + PATCH[1]))
            expected = own * batch.pixels[clip][box] + (1 - own) * batch.pixels[partner][box]
            torch.testing.assert_close(found.pixels[clip][box], expected)
        expected = share * batch.cls[clip] + (1 - share) * batch.cls[partner]
        torch.testing.assert_close(found.cls[clip], expected)
    edge = torch.from_numpy(draws.maps[:, -1, -1]).view(4, *(1,) * (batch.pixels.ndim - 3))
    expected = edge * batch.pixels[:4, ..., -1, -1] + (1 - edge) * batch.pixels[plan.partners, ..., -1, -1]
    torch.testing.assert_close(found.pixels[..., -1, -1], expected, msg="what no patch covers goes with the last")
    assert found.labels.tolist() == [50, 51, 52, 53] and found.mixed.labels.tolist() == [51, 50, 54, 52]
    assert found.mixed.shares.tolist() == draws.shares.tolist()
    assert sum(1 for _ in found.tensors()) == 6, "those of mixing are handed to a GPU's steps too"


@pytest.mark.parametrize("coded", ["int8", "float16", "float32", "cube"])
def test_cutmix_takes_whole_codes_and_mixup_holds_no_more_than_it_must(coded):
    codec = make_codec(coded)
    batch = make_batch(2, codec)
    cut = Mixer(GRID, PATCH).mix(copy(batch), plan_of([1, 0], 2, make_mixing("cutmix", seed=3)), torch.from_numpy)
    assert cut.patches.dtype == batch.patches.dtype and codec_after(codec, make_mixing("cutmix")) is codec
    kept = torch.from_numpy(make_mixing("cutmix", seed=3).draw(np.arange(2), np.arange(2), GRID).maps).flatten(1) > 0
    assert kept.any() and not kept.all()
    for clip in range(2):
        is_own = kept[clip]
        assert torch.equal(cut.patches[clip][:, :, is_own], batch.patches[clip][:, :, is_own])
        assert torch.equal(cut.patches[clip][:, :, ~is_own], batch.patches[1 - clip][:, :, ~is_own])
    mixing = make_mixing("mixup")
    assert mixing.decodes(codec) == (coded == "cube")
    mixer = Mixer(GRID, PATCH, codec if mixing.decodes(codec) else None)
    mixed = mixer.mix(copy(batch), plan_of([1, 0], 2, mixing), torch.from_numpy)
    wide = torch.float32 if coded in ("float32", "cube") else torch.float16
    assert mixed.patches.dtype == wide and mixed.patches.shape[-1] == (
        6 if coded == "cube" else batch.patches.shape[-1]
    )


@given(
    kind=st.sampled_from(KINDS),
    grid=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 99),
    rows=st.lists(st.integers(0, 2**31), min_size=1, max_size=6),
)
def test_what_is_drawn_follows_from_seed_epoch_and_clip_alone(kind, grid, seed, epoch, rows):
    mixing, views = make_mixing(kind, seed, epoch), np.arange(len(rows)) % 3
    draws = mixing.draw(np.asarray(rows), views, grid)
    for place, (row, view) in enumerate(zip(rows, views, strict=True)):
        alone = mixing.draw(np.array([row]), np.array([view]), grid)
        assert np.array_equal(alone.maps[0], draws.maps[place]) and alone.shares[0] == draws.shares[place]
    for share, map_ in zip(draws.shares, draws.maps, strict=True):
        assert share == pytest.approx(map_.mean(), abs=1e-6)
        if len(levels := np.unique(map_)) == 1 and levels[0] not in (0, 1):
            assert kind != "cutmix"
            continue
        assert set(levels) <= {0, 1} and (kind != "mixup" or len(levels) == 1)
        down, across = (np.flatnonzero((map_ == 0).any(axis=axis)) for axis in (1, 0))
        assert (map_ == 0).sum() == len(down) * len(across), "a box"
        assert all(later - earlier == 1 for side in (down, across) for earlier, later in pairwise(side))


def test_draws_differ_by_seed_epoch_row_and_view_and_have_the_shares_of_their_distributions():
    one = lambda **changes: make_mixing("mixup", **changes)  # noqa: E731
    draw = lambda mixing, row, view: float(mixing.draw(np.array([row]), np.array([view]), GRID).shares[0])  # noqa: E731
    found = [draw(one(), 0, 0), draw(one(seed=1), 0, 0), draw(one(epoch=1), 0, 0), draw(one(), 1, 0), draw(one(), 0, 1)]
    assert len(set(found)) == 5
    rows = np.arange(4000)
    mixup = one().draw(rows, 0 * rows, (1, 1)).shares
    assert mixup.mean() == pytest.approx(0.5, abs=0.02)
    assert mixup.var() == pytest.approx(0.25 / (2 * 0.8 + 1), rel=0.08), "of Beta(0.8, 0.8)"
    maps = make_mixing("cutmix").draw(rows, 0 * rows, (14, 14)).maps
    visible = 1 / 2 - 1 / 5 + 1 / 48  # the mean of (s - s^2 / 4)^2 where s^2 is uniform: a side s around any place
    assert maps.mean() == pytest.approx(1 - visible, abs=0.01)
    both = make_mixing("both").draw(rows, 0 * rows, (14, 14)).maps.reshape(4000, -1)
    assert np.mean([(len(np.unique(one)) == 1) and one[0] not in (0, 1) for one in both]) == pytest.approx(
        0.5, abs=0.03
    )


def list_pairs(plans):
    """Of each clip, in order: itself and its partner, by row, view and frames."""
    clips = []
    for plan in plans:
        names = [(int(r), int(v), p.tobytes()) for r, v, p in zip(plan.rows, plan.views, plan.places, strict=True)]
        clips += [(names[clip], names[partner]) for clip, partner in enumerate(plan.partners)]
    return clips


@settings(deadline=None)
@given(
    count=st.integers(2, 40),
    step=st.integers(1, 12),
    views=st.integers(1, 2),
    shares=st.sampled_from([(1, 2), (2, 1), (1, 3), (3, 1)]),
    epoch=st.integers(0, 3),
)
def test_however_a_step_is_shared_out_the_same_clips_are_mixed(count, step, views, shares, epoch):
    """One batch of all, or several, of one process or of several: `--accumulate` and `torchrun`."""
    processes, batches = shares
    data, mixing = make_rows(count, num_views=2), make_mixing(epoch=epoch)

    def plan(size, rank=0, num_ranks=1):
        options = dict(num_frames=4, batch_size=size * views, views_per_video=views, seed=3, epoch=epoch)
        plain = plan_training_epoch(data, rank=rank, num_ranks=num_ranks, **options)
        return plain, [pair_clips(one, mixing) for one in plain]

    total = step * processes * batches
    if total > count:
        return
    plain, whole = plan(total)
    for one, paired in zip(plain, whole, strict=True):
        clips = paired.num_clips
        assert clips == len(one.rows) and np.array_equal(paired.rows[:clips], one.rows), "the order is as ever"
        assert np.array_equal(paired.places[:clips], one.places) and np.array_equal(paired.labels[:clips], one.labels)
        assert len(paired.rows) - clips <= 2 * views, "at a batch's ends"
    by_process = [plan(step, rank, processes)[1] for rank in range(processes)]
    num_steps = len(whole)
    shared = []
    for number in range(num_steps):
        for batch in range(batches):
            shared += list_pairs([own[number * batches + batch] for own in by_process])
    pairs = list_pairs(whole)
    assert shared == pairs
    assert all(own[0] != partner[0] for own, partner in pairs), "of another video"
    partner_of = dict(pairs)
    mutual = sum(partner_of.get(partner) == own for own, partner in pairs)
    assert mutual >= len(pairs) - 4 * views, "all but at the ends of the epoch are mixed with each other"


@given(
    smoothing=st.sampled_from([0.0, 0.1, 0.3]),
    num_classes=st.integers(2, 9),
    num_clips=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_the_loss_is_that_of_the_mixed_and_smoothed_target(smoothing, num_classes, num_clips, seed):
    """The reference's target: off smoothing / k, on 1 - smoothing + smoothing / k, then mixed."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_clips, num_classes, generator=generator)
    own, other = torch.randint(num_classes, (2, num_clips), generator=generator)
    shares = torch.rand(num_clips, generator=generator)
    config = TrainConfig(features="", out="", label_smoothing=smoothing)
    target = torch.zeros(num_clips, num_classes)
    for clip in range(num_clips):
        for label, share in ((own[clip], shares[clip]), (other[clip], 1 - shares[clip])):
            smooth = torch.full((num_classes,), smoothing / num_classes)
            smooth[label] = 1 - smoothing + smoothing / num_classes
            target[clip] += share * smooth
    found = classification_loss(logits, own, config, MixedLabels(other, shares))
    torch.testing.assert_close(found, F.cross_entropy(logits, target), rtol=1e-5, atol=1e-6)
    alone = classification_loss(logits, own, config)
    torch.testing.assert_close(
        classification_loss(logits, own, config, MixedLabels(other, torch.ones(num_clips))), alone
    )
    assert torch.equal(alone, F.cross_entropy(logits, own, label_smoothing=smoothing)), "as ever where nothing is mixed"


def test_frames_that_either_clip_has_are_there():
    batch = make_batch(2, make_codec("float16"))
    batch = replace(batch, frame_mask=torch.tensor([[True, True, False], [True, False, False]]))
    found = Mixer(GRID, PATCH).mix(batch, plan_of([1, 0], 2, make_mixing("cutmix")), torch.from_numpy)
    assert found.frame_mask.tolist() == [[True, True, False]] * 2


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=2, batch_size=2, side_width=64, device="cpu", warmup_epochs=1.0)
    return TrainConfig(**{**values, "checkpoint_minutes": 0.0, **changes})


def test_a_loader_mixes_what_it_reads(int8_store):
    store = open_store(int8_store)
    loader = ClipLoader(store, arrays=("patches", "cls", "pixels"), layers=(1, 5), device=CPU)
    data = tasks.find_labelled_rows(store, "train")
    plans = plan_training_epoch(data, num_frames=4, batch_size=3, seed=0, epoch=0)
    mixing = make_mixing("cutmix", seed=2)
    paired = [pair_clips(plan, mixing) for plan in plans]
    assert [len(plan.rows) - plan.num_clips for plan in paired] == [1, 1], "of clips 3 and 4 each is in another batch"
    assert loader.count_bytes(paired[0]) > loader.count_bytes(plans[0])
    (first, second), found = loader.load(plans), list(loader.load(paired))
    draws = mixing.draw(plans[0].rows, plans[0].views, store.facts.backbone.grid)
    shares = torch.from_numpy(draws.shares)[:2, None, None, None]
    torch.testing.assert_close(found[0].cls[:2], torch.lerp(first.cls[[1, 0]], first.cls[:2], shares))
    own, other = first.cls[2], second.cls[0]
    torch.testing.assert_close(found[0].cls[2], torch.lerp(other, own, float(draws.shares[2])))
    assert found[0].labels.tolist() == first.labels.tolist()
    assert found[0].mixed.labels.tolist() == [*first.labels[[1, 0]].tolist(), int(second.labels[0])]


@pytest.mark.parametrize("size", [1, 3])
def test_what_stands_in_for_a_clip_stands_in_for_a_partner_too(int8_store, monkeypatch, size):
    store, read = open_store(int8_store), ClipLoader._read_clips
    data = tasks.find_labelled_rows(store, "train")
    whole = plan_training_epoch(data, num_frames=4, batch_size=6, seed=0, epoch=0)
    damaged = int(whole[0].rows[1])

    def refuse(loader, plan):
        if damaged in plan.rows:
            raise StoreDamagedError("a chunk is damaged", row=damaged)
        return read(loader, plan)

    monkeypatch.setattr(ClipLoader, "_read_clips", refuse)

    def load(batch_size):
        bad = BadRows(1)
        plans = plan_training_epoch(data, num_frames=4, batch_size=batch_size, seed=0, epoch=0)[: 6 // batch_size]
        loader = ClipLoader(store, arrays=("patches", "cls"), layers=(5,), device=CPU, bad=bad)
        batches = list(loader.load([pair_clips(plan, make_mixing("mixup")) for plan in plans]))
        assert bad.rows == {damaged}
        parts = [(one.patches, one.cls, one.labels, one.mixed.labels, one.mixed.shares) for one in batches]
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    for ours, theirs in zip(load(size), load(6), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope="module")
def mixed_run(int8_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mixed"
    return out, train_run(config_for(int8_store, out, mix="both"))


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_was_stopped_goes_on_to_the_same_bit(
    assert_same_run, step, mixed_run, int8_store, tmp_path, interrupted
):
    config = config_for(int8_store, tmp_path / "run", mix="both")
    with interrupted(tasks, "classification_loss", step + 1) as seen:
        train_run(config)
    assert all(mixed is not None for *_, mixed in seen)
    train_run(replace(config, resume=True))
    assert_same_run(tmp_path / "run", mixed_run[0])
    with pytest.raises(RunExistsError, match="mix both there, mixup here"):
        train_run(replace(config, resume=True, mix="mixup"))


def test_a_run_from_before_mixes_nothing_and_goes_on_so(assert_same_run, int8_store, tmp_path):
    train_run(config_for(int8_store, tmp_path / "plain", epochs=1))
    out = shutil.copytree(tmp_path / "plain", tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    for name in ("mix", "mixup_alpha", "cutmix_alpha"):
        del config["train"][name]
    (out / "config.json").write_text(json.dumps(config))
    train_run(config_for(int8_store, out, epochs=1, resume=True))
    assert_same_run(out, tmp_path / "plain")
    assert "train_top1" not in read_metrics(open_run(out))[0]
    with pytest.raises(RunExistsError, match="mix none there, cutmix here"):
        train_run(config_for(int8_store, out, epochs=1, resume=True, mix="cutmix"))


def test_batches_of_a_step_and_two_processes_learn_what_one_batch_does(trained_by_two, int8_store, tmp_path):
    """Batches of two and of one clip: of the latter every partner is read beside them."""
    common = dict(head="attentive", mix="both", learning_rate=1e-3)
    train_run(config_for(int8_store, tmp_path / "one", batch_size=2, **common))
    train_run(config_for(int8_store, tmp_path / "parts", batch_size=1, accumulate=2, **common))
    plain = config_for(int8_store, tmp_path / "plain", **{**common, "mix": "none"})
    train_run(plain)
    runs = {"two": trained_by_two / "mixed", **{name: tmp_path / name for name in ("one", "parts", "plain")}}
    losses = {name: [one["train_loss"] for one in read_metrics(open_run(run))] for name, run in runs.items()}
    assert losses["parts"] == pytest.approx(losses["one"], rel=1e-4)
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    assert losses["plain"] != pytest.approx(losses["one"], rel=1e-3)


def test_training_accuracy_is_that_of_clips_as_they_are(mixed_run, int8_store):
    out, summary = mixed_run
    metrics = read_metrics(open_run(out))
    assert all("train_top1" in one for one in metrics)
    run, store = open_run(out), open_store(int8_store)
    scorer = Scorer.of_run(run, store, checkpoint="last")
    data = replace(tasks.find_labelled_rows(store, "train"), shows_centre_alone=True)
    result = tasks.evaluate_classes(scorer, data, num_clips=1)
    assert len(data) == 8 and metrics[-1]["train_top1"] == float((result.predictions == result.labels).mean())
    assert "train_top1" in tasks.Recognition.describe_shares(summary["last"])
    assert evaluate_run(out, with_page=True)["videos"] == 2 and (out / "results_val.html").is_file()


def test_telling_training_accuracy_changes_nothing_that_is_learnt(mixed_run, int8_store, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.Recognition, "score_training", lambda *_: {})
    train_run(config_for(int8_store, tmp_path / "run", mix="both"))
    ours, theirs = (load_file(folder / "last.safetensors") for folder in (tmp_path / "run", mixed_run[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_accuracy_is_of_so_many_videos_and_of_none_that_is_bad(int8_store, tmp_path, monkeypatch):
    store, asked = open_store(int8_store), []

    def note(scorer, data, **_):
        asked.append(data.rows.tolist())
        return tasks.Evaluation(data.rows, data.labels, np.eye(2, dtype=np.float32)[data.labels], 0.0)

    monkeypatch.setattr(tasks, "evaluate_classes", note)
    monkeypatch.setattr(tasks, "_MOST_SCORED", 3)
    task = tasks.Recognition(config_for(int8_store, tmp_path, mix="mixup"), store)
    rows = task.training.rows.tolist()
    assert task.score_training(None, frozenset()) == {"train_top1": 1.0}
    assert task.score_training(None, {rows[0]}) == {"train_top1": 1.0}
    assert asked[0] == [rows[0], rows[4], rows[7]] and rows[0] not in asked[1] and len(asked[1]) == 3
    assert tasks.Recognition(config_for(int8_store, tmp_path), store).score_training(None, ()) == {}


def test_training_accuracy_is_told_without_a_validation_split_too(int8_store, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "take_validation_clips", lambda data: data.take(np.arange(0)))
    summary = train_run(config_for(int8_store, tmp_path / "run", head="linear", side_width=None, mix="cutmix"))
    assert 0 <= summary["last"]["train_top1"] <= 1 and "val_top1" not in summary["last"]


def test_heads_of_a_sweep_share_mixed_batches(int8_store, tmp_path):
    base = config_for(int8_store, tmp_path / "sweep", head="linear", side_width=None, mix="mixup", epochs=1)
    sweep = sweep_heads(base, learning_rates=[1e-3, 1e-2])
    alone = replace(base, out=tmp_path / "alone", learning_rate=1e-2, hold_out=0.1, order_seed=0)
    train_run(alone)
    ours, theirs = (load_file(folder / "last.safetensors") for folder in (sweep.out / "heads/001", alone.out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mix="blend"), "--mix takes none, mixup, cutmix, both; found 'blend'"),
        (dict(mix="mixup", mixup_alpha=0.0), "--mixup-alpha must be a number above 0; found 0"),
        (dict(mix="cutmix", cutmix_alpha=float("inf")), "--cutmix-alpha must be a number above 0; found inf"),
        (dict(mixup_alpha=0.2), "--mixup-alpha has no effect on --mix none: leave it out, or take --mix mixup"),
        (dict(mix="mixup", cutmix_alpha=0.2), "--cutmix-alpha has no effect on --mix mixup: leave it out"),
        (dict(mix="both", task="retrieval"), "--mix has no effect on --task retrieval: leave it out"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=f"^{message}"):
        TrainConfig(features=tmp_path, out=tmp_path, **options)


def test_options_that_do_not_matter_are_as_they_are_by_default(tmp_path):
    assert Mixing.of_config(TrainConfig(features=tmp_path, out=tmp_path), 0) is None
    config = TrainConfig(features=tmp_path, out=tmp_path, mix="both", mixup_alpha=0.2, cutmix_alpha=0.4, order_seed=5)
    assert Mixing.of_config(config, 3) == Mixing(kind="both", mixup_alpha=0.2, cutmix_alpha=0.4, seed=5, epoch=3)
