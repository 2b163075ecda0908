"""Searching with the frames of a trained run."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from timm.models import register_model
from timm.models.eva import Eva
from typer.testing import CliRunner

from s4v.backbone import open_clip_models as architectures
from s4v.backbone.text_tower import load_text_tower
from s4v.cli import app
from s4v.errors import ConfigError, RunNotFoundError
from s4v.extract.extraction import extract_dataset
from s4v.retrieve.index_reader import default_index_path, open_index
from s4v.retrieve.index_writer import fingerprint
from s4v.retrieve.search import Searcher, search_store
from s4v.retrieve.trained_frames import TrainedFrames
from s4v.store.reader import open_store
from s4v.store.texts import TextReader
from s4v.train.clips import ClipLoader, LabelledRows, find_captioned_rows
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.networks import find_network
from s4v.train.run_folder import open_run
from s4v.train.scorer import Scorer
from s4v.train.settings import plan_network
from s4v.train.tasks.retrieval import embed_clips, evaluate_texts

CPU = torch.device("cpu")


def train(store, out, **changes):
    values = dict(features=store, out=out, task="retrieval", epochs=2, batch_size=4, side_width=64, device="cpu")
    train_run(TrainConfig(**{**values, **changes}))
    return out


@pytest.fixture(scope="module", params=["mean", "wti"])
def run(request, captioned_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    return train(captioned_store, out, interaction=request.param, learning_rate=1e-2)


def test_a_search_ranks_as_the_evaluation_does(run, captioned_store):
    """Captions as queries: the same scores, but for the float16 in which the index keeps frames."""
    store = open_store(captioned_store)
    opened, data = open_run(run), find_captioned_rows(store, "val")
    result = evaluate_texts(Scorer.of_run(opened, store), data)
    texts = store.read_captions()["text"].to_pylist()
    with Searcher(store, run=run, where="split = 'val'") as searcher:
        for place, caption in enumerate(data.labels):
            answers = searcher.find_text(texts[caption], top=4)
            assert [a.rank for a in answers] == [1, 2, 3, 4]
            expected = dict(zip(result.rows.tolist(), result.scores[place], strict=True))
            for answer in answers:
                assert answer.score == pytest.approx(expected[answer.row], abs=2e-3)
            assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)


def test_the_index_of_a_run_is_the_runs_own(run, captioned_store, tmp_path):
    store = open_store(captioned_store)
    trained = TrainedFrames(run)
    index = open_index(store, trained=trained)
    assert index.path == default_index_path(store.path, run) == run / "captioned.index"
    assert index.facts.videos == 12 and index.facts.run == str(run.resolve())
    frames, times = index.frames_of(0)
    assert len(frames) == len(times) == open_run(run).frames
    np.testing.assert_allclose(np.linalg.norm(frames, axis=1), 1, rtol=1e-3)
    stamps = store.read_manifest(["timestamps_s"])["timestamps_s"][int(index.rows[0])].as_py()
    assert set(times) <= set(stamps)
    before = (run / "captioned.index/index.json").stat().st_mtime_ns
    open_index(store, trained=trained)
    assert (run / "captioned.index/index.json").stat().st_mtime_ns == before
    copied = shutil.copytree(run, tmp_path / "run")
    told = json.loads((copied / "best.json").read_text())
    (copied / "best.json").write_text(json.dumps({**told, "sha256": "0" * 64}))
    from s4v.errors import StoreDamagedError

    with pytest.raises(StoreDamagedError, match="does not match the hash"):
        open_index(store, trained=TrainedFrames(copied))


@pytest.mark.parametrize("normalises_frames", [True, False])
def test_videos_are_found_by_the_mean_that_the_run_compares(captioned_store, tmp_path, normalises_frames):
    """Frames of very different lengths: the mean of frames and that of their directions point elsewhere."""
    out = tmp_path / "run"
    options = dict(epochs=1, interaction="mean", set=(f"normalises_frames={str(normalises_frames).lower()}",))
    trained = TrainedFrames(train(captioned_store, out, **options))
    lengths = torch.tensor([0.01, 1.0, 3.0, 0.2])
    trained.network.end.register_forward_hook(lambda _, __, output: output * lengths[: output.shape[1], None])
    store = open_store(captioned_store)
    index, data = open_index(store, trained=trained), find_captioned_rows(store, "val")
    frames = embed_clips(trained.scorer, data)
    directions = frames / np.linalg.norm(frames, axis=2, keepdims=True)
    means = {True: directions.mean(axis=1), False: frames.mean(axis=1)}
    found = {
        name: (index.vector_of(int(np.flatnonzero(index.rows == data.rows[0])[0])) @ mean[0]) / np.linalg.norm(mean[0])
        for name, mean in means.items()
    }
    assert found[normalises_frames] == pytest.approx(1, abs=1e-6) and found[not normalises_frames] < 1 - 1e-4
    result, interaction = evaluate_texts(trained.scorer, data), trained.network.interaction
    assert interaction.normalises_frames == normalises_frames
    texts = TextReader(store).read(data.labels[:1], ("embedding",)).embedding[0]
    expected = texts @ means[normalises_frames][0] / np.linalg.norm(texts) / np.linalg.norm(means[normalises_frames][0])
    place = result.rows.tolist().index(int(data.rows[0]))
    assert result.scores[0, place] == pytest.approx(expected, abs=1e-5)


def test_a_run_that_was_never_moved_finds_what_the_backbone_finds(captioned_store, tmp_path):
    alike = dict(interaction="mean", set=("normalises_frames=true",))
    run = train(captioned_store, tmp_path / "still", epochs=1, learning_rate=1e-12, **alike)
    frozen, trained = (search_store(captioned_store, "a ring moves left", top=12, run=one) for one in (None, run))
    # The backbone alone looks at all cached frames, the run at T of them: where they are the same, so are scores.
    by_id = {a.video_id: a.score for a in frozen}
    for answer in trained:
        if answer.row >= 8:
            assert answer.score == pytest.approx(by_id[answer.video_id], abs=1e-5)


@register_model
def eva_for_retrieval(pretrained: bool = False, **options: object) -> Eva:
    """ViT-E's kind of block (post-norm), shrunken."""
    kept = {name: options[name] for name in ("num_classes", "global_pool") if name in options}
    sizes = dict(img_size=28, patch_size=14, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2.0, use_post_norm=True)
    model = Eva(**sizes, **kept)
    model.default_cfg = {"pool_size": None}
    return model


@pytest.fixture
def eva_store(video_folder, make_config, tmp_path):
    vision = dict(image_size=28, timm_model_name="eva_for_retrieval", timm_pool="token", timm_proj=None)
    text = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=2)
    told = dict(embed_dim=24, vision_cfg=vision, text_cfg=text, custom_text=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/EVA02-shrunken.json").write_text(json.dumps(told))
    open_clip.add_model_config(tmp_path / "models")
    architectures.read_architecture.cache_clear()
    config = make_config(video_folder, tmp_path / "eva.zarr", model="EVA02-shrunken", layers="1,3")
    extract_dataset(config)
    return open_store(config.out)


def test_beside_eva_too_an_untrained_network_is_the_frozen_backbone(eva_store):
    config = TrainConfig(features=eva_store.path, out=eva_store.path, side_width=64, task="retrieval")
    head = find_network("side4video").build(plan_network(config, eva_store))
    head.prepare(eva_store)
    assert head.end.project.bias is not None, "as EVA's own end has it"
    rows = np.flatnonzero(np.asarray(eva_store.read_manifest(["status"])["status"]) == "ok")
    four = [[0, 1, 2, 3]] * len(rows)
    data = LabelledRows(rows, rows, np.full(len(rows), 4), np.ones_like(rows), [[clip] for clip in four])
    scorer = Scorer(head, eva_store, layers=(1, 3), num_frames=4, batch_size=3, device=CPU)
    found = embed_clips(scorer, data)
    frozen = eva_store.read_embeddings()[rows, 0, :4]
    np.testing.assert_allclose(found, frozen, rtol=0, atol=1e-5)
    # Not one number for all: the tower's final norm takes a constant away.
    torch.nn.init.normal_(head.widen.weight, std=0.1)
    moved = embed_clips(scorer, data)
    assert np.abs(moved - frozen).max() > 1e-3


def test_all_reads_of_an_index_share_one_loader(run, monkeypatch):
    made, make = [], ClipLoader.for_network
    monkeypatch.setattr(ClipLoader, "for_network", lambda *given, **named: made.append(1) or make(*given, **named))
    trained = TrainedFrames(run)
    rows = np.flatnonzero(np.asarray(trained.store.read_manifest(["status"])["status"]) == "ok")
    parts = [trained.embed(part, [[0, 1, 2, 3]] * len(part)).frames for part in np.array_split(rows, 3)]
    whole = trained.embed(rows, [[0, 1, 2, 3]] * len(rows)).frames
    assert len(made) == 1
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-5)


def test_the_command_takes_the_newest_retrieval_run(run, captioned_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs/mine")
    result = CliRunner().invoke(app, ["retrieve", "--query", "a red cross", "--json"], catch_exceptions=False)
    told = json.loads(result.stdout)
    assert told["run"] == "runs/mine" and len(told["answers"]) == 10
    result = CliRunner().invoke(app, ["index", "--run", "runs/mine", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["index"] == "runs/mine/captioned.index"
    frozen = CliRunner().invoke(app, ["retrieve", "--query", "x", "--features", str(captioned_store), "--json"])
    assert json.loads(frozen.stdout)["run"] is None
    like = CliRunner().invoke(app, ["retrieve", "--like", "03.mp4", "--run", "runs/mine", "--top", "2", "--json"])
    assert len(json.loads(like.stdout)["answers"]) == 2
    assert CliRunner().invoke(app, ["index"]).exit_code == 1
    last = ["retrieve", "--query", "a red cross", "--checkpoint", "last", "--device", "cpu", "--json"]
    assert json.loads(CliRunner().invoke(app, last).stdout)["answers"]
    facts = json.loads((tmp_path / "runs/mine/captioned.index/index.json").read_text())
    assert facts["fingerprint"] == fingerprint(open_store(captioned_store), TrainedFrames(run, checkpoint="last"))
    (tmp_path / "runs/mine/last.json").unlink()
    for command in ("retrieve", "index"):
        options = ["--query", "x"] if command == "retrieve" else []
        failed = CliRunner().invoke(app, [command, *options, "--run", "runs/mine", "--checkpoint", "last"])
        assert failed.exit_code == RunNotFoundError.exit_code and "has no checkpoint 'last' yet" in failed.stderr


def test_other_runs_are_no_help(captioned_store, int8_store, tmp_path):
    train_run(TrainConfig(features=int8_store, out=tmp_path / "linear", head="linear", epochs=1, device="cpu"))
    with pytest.raises(ConfigError, match="linear knows classes: a search wants a run of `s4v train --task retrieval`"):
        TrainedFrames(tmp_path / "linear")


def test_words_of_a_query_are_those_of_the_store(captioned_store):
    """What re-ranking compares is what training and evaluation compared."""
    store = open_store(captioned_store)
    texts = store.read_captions()["text"].to_pylist()
    kept = TextReader(store).read([0])
    tower = load_text_tower("tiny-clip", weights="random:0", device=CPU)
    found = tower.encode_words([texts[0]], 28)
    np.testing.assert_array_equal(found.tokens, kept.tokens)
    np.testing.assert_array_equal(found.mask, kept.mask)
