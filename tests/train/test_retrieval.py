import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, EnvironmentFailedError, RunExistsError, StoreMismatchError
from s4v.store.manifest import read_table
from s4v.store.reader import open_store
from s4v.store.texts import TextReader
from s4v.train.clips import ClipBatch, find_captioned_rows, hand_over_texts
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks import find_network
from s4v.train.networks.side4video import Side4Video
from s4v.train.networks.text_interaction import contrastive_loss
from s4v.train.paper.presets import PRESETS
from s4v.train.recipe import find_biases, learning_rate_at, make_optimizer
from s4v.train.run_folder import find_newest_run, open_run, read_metrics
from s4v.train.scorer import Scorer
from s4v.train.settings import find_optimisation, plan_network, resolve_preset
from s4v.train.tasks import retrieval
from s4v.train.tasks.retrieval import (
    Retrieval,
    embed_clips,
    evaluate_frozen_retrieval,
    evaluate_texts,
    read_frozen_clips,
)

CPU = torch.device("cpu")


def config_for(store, out, **changes):
    values = dict(features=store, out=out, task="retrieval", epochs=2, batch_size=4, side_width=64, device="cpu")
    return TrainConfig(**{**values, "checkpoint_minutes": 0.0, **changes})


def build(store, **options):
    """A fresh side network for retrieval beside a store's backbone."""
    return find_network("side4video").build(plan_network(config_for(store.path, store.path, **options), store))


@pytest.fixture(scope="module", params=["mean", "wti"])
def trained(request, captioned_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    return out, train_run(config_for(captioned_store, out, interaction=request.param))


def test_each_caption_is_a_pair_with_its_good_video(captioned_store):
    store = open_store(captioned_store)
    captions = store.read_captions().to_pylist()
    ids = store.read_manifest(["video_id"])["video_id"].to_pylist()
    for split, count in (("train", 12), ("val", 6)):
        data = find_captioned_rows(store, split)
        assert len(data) == count
        for row, caption in zip(data.rows, data.labels, strict=True):
            assert captions[caption]["video_id"] == ids[row]
    assert not len(find_captioned_rows(store, "test"))


@pytest.mark.parametrize("interaction", ["mean", "wti"])
def test_an_untrained_network_is_the_frozen_backbone(captioned_store, interaction):
    """Of a float32 store to float32's last bits: the same class tokens through the same norm and projection."""
    store = open_store(captioned_store)
    head = build(store, interaction=interaction)
    head.prepare(store)
    data = find_captioned_rows(store, "val")
    scorer = Scorer(head, store, layers=store.layout.layers, num_frames=4, batch_size=3, device=CPU)
    assert not head.normalises_frames
    found, frozen = evaluate_texts(scorer, data), evaluate_frozen_retrieval(store, data, 4, normalises_frames=False)
    np.testing.assert_array_equal(found.video_of_text, frozen.video_of_text)
    expected = read_frozen_clips(store, data, 4)
    np.testing.assert_array_equal(store.read_embeddings()[data.rows, 0, :4], expected)
    np.testing.assert_allclose(embed_clips(scorer, data), expected, rtol=0, atol=1e-5)
    if interaction == "mean":
        np.testing.assert_allclose(found.scores, frozen.scores, rtol=0, atol=2e-6)


def test_a_run_trains_and_knows_its_figures(trained, captioned_store):
    out, summary = trained
    metrics = read_metrics(open_run(out))
    assert {"train_loss", "val_r1", "val_r5", "val_r10", "val_median_rank"} <= set(metrics[0])
    assert summary["steps"] == 6 and summary["videos"] == {"train": 8, "val": 4}
    assert summary["preset"] == "none"
    saved = json.loads((out / "config.json").read_text())
    assert saved["head"]["interaction"] == out.name and saved["train"]["clip_norm"] == 1.0
    figures = evaluate_run(out, checkpoint="last", with_dual_softmax=True)
    assert figures["text_to_video"]["r1"] == metrics[-1]["val_r1"]
    assert figures["videos"] == 4 and figures["captions"] == 6 and figures["lost_captions"] == 1
    assert {"text_to_video", "video_to_text"} == set(figures["dual_softmax"]) == set(figures["frozen"])
    ranks = read_table(out / "ranks_val.parquet").to_pylist()
    assert np.mean([one["rank"] == 1 for one in ranks]) == figures["text_to_video"]["r1"]
    assert all((one["first"] == one["video_id"]) for one in ranks if one["rank"] == 1)
    backwards = evaluate_run(out, checkpoint="last", is_backwards=True)
    assert backwards["is_backwards"] and (out / "eval_val_backwards.json").exists()


def test_weights_move_and_the_backbones_a_little(trained, captioned_store):
    state, head = load_file(trained[0] / "last.safetensors"), open_store(captioned_store).head
    for name, of_backbone in (
        ("end.norm.weight", head["norm_weight"]),
        ("end.project.weight", head["proj_weight"]),
        ("logit_scale", head["logit_scale"]),
    ):
        moved = np.abs(state[name].numpy() - of_backbone).max()
        assert 0 < moved < 2e-6, (name, moved)  # six steps of a thousandth of 1e-4
    assert state["widen.weight"].abs().max() > 1e-5
    assert any(name.startswith("interaction.") for name in state) == (trained[0].name == "wti")


def test_captions_that_are_told_apart_can_be_learnt(captioned_store, tmp_path):
    """Enough steps at a high rate overfit the training videos: their captions then stand nearer to them."""
    quick = dict(layers=(1, 3, 5), epochs=16, validate_every=16, learning_rate=1e-2, val_split="train")
    train_run(config_for(captioned_store, tmp_path / "run", **quick))
    losses = [line["train_loss"] for line in read_metrics(open_run(tmp_path / "run"))]
    assert losses[-1] < 0.8 * losses[0]
    figures = evaluate_run(tmp_path / "run", split="train")
    assert figures["text_to_video"]["mean_rank"] < 0.75 * figures["frozen"]["text_to_video"]["mean_rank"]


def test_negatives_are_other_videos_that_the_text_does_not_fit(captioned_store):
    store = open_store(captioned_store)
    task = Retrieval(config_for(captioned_store, None), store)
    captions = store.read_captions().to_pylist()
    pairs = task._identities[task.training.labels]
    is_same = (pairs[:, None] == pairs[None]).any(dim=2).numpy()
    told = [captions[place] for place in task.training.labels]
    expected = [[a["video_id"] == b["video_id"] or a["text"] == b["text"] for b in told] for a in told]
    np.testing.assert_array_equal(is_same, expected)
    assert is_same.sum() == 12 + 2 * 4 + 2, "itself, the second caption of four videos, one text of two videos"
    # The odd one of the two videos has a second caption, of which the text's equality does not tell.


def test_a_video_can_choose_among_all_captions(captioned_store):
    """By brute force: each video against its own caption and every caption that is neither of it nor says the same."""
    store = open_store(captioned_store)
    task = Retrieval(config_for(captioned_store, None, negatives="all"), store)
    head = build(store)
    head.prepare(store)
    assert head.text_arrays == ("embedding",)
    task.begin(head)
    captions, reader = store.read_captions().to_pylist(), TextReader(store)
    chosen = task.training.labels[[0, 3, 7, 8]]
    batch = ClipBatch(None, None, None, torch.from_numpy(chosen), hand_over_texts(reader.read(chosen), CPU))
    frames = torch.randn(4, 3, store.layout.embed_dim, generator=torch.Generator().manual_seed(0))
    found = task.compute_loss(head, frames, batch, lambda values: values)
    videos = torch.nn.functional.normalize(frames.mean(1), dim=-1)
    texts = torch.nn.functional.normalize(torch.from_numpy(reader.read(range(19), ("embedding",)).embedding), dim=-1)
    scores = torch.exp(task._logit_scale) * texts @ videos.T  # (19, 4)
    told = [captions[place] for place in chosen]
    fits = lambda a, b: a["video_id"] == b["video_id"] or a["text"] == b["text"]  # noqa: E731
    losses = []
    for place, caption in enumerate(chosen):
        others = [c for c in task.training.labels if not fits(captions[c], captions[caption])]
        losses.append(-(scores[caption, place] - torch.logsumexp(scores[[caption, *others], place], 0)))
        step = [p for p, other in enumerate(told) if p == place or not fits(other, captions[caption])]
        losses.append(-(scores[caption, place] - torch.logsumexp(scores[caption, step], 0)))
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_two_processes_share_their_negatives(trained_by_two, assert_learnt_alike, captioned_store, tmp_path):
    one = config_for(captioned_store, tmp_path / "one", batch_size=6, interaction="wti", learning_rate=1e-12)
    train_run(TrainConfig(**{**{n: getattr(one, n) for n in TrainConfig.__dataclass_fields__}, "warmup_epochs": 1.0}))
    assert_learnt_alike(tmp_path / "one", trained_by_two / "retrieval")


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_stopped_run_goes_on_to_the_same_bit(assert_same_run, step, trained, captioned_store, tmp_path, interrupted):
    interaction = trained[0].name
    with interrupted(retrieval, "contrastive_loss", step + 1):
        train_run(config_for(captioned_store, tmp_path / "run", interaction=interaction))
    train_run(config_for(captioned_store, tmp_path / "run", interaction=interaction, resume=True))
    assert_same_run(tmp_path / "run", trained[0])


def test_the_recipe_is_the_references():
    config = TrainConfig(
        features=None, out=None, task="retrieval", epochs=5, learning_rate=1e-4, warmup_epochs=0.5, weight_decay=0.2
    )
    schedule = Retrieval.optimisation.schedule
    assert learning_rate_at(0.25, config, schedule) == pytest.approx(0.5e-4)
    for epoch in (0.5, 2.5, 4.9):
        expected = 0.5e-4 * (1 + np.cos(np.pi * epoch / 5))
        assert learning_rate_at(epoch, config, schedule) == pytest.approx(expected)


@pytest.mark.parametrize("undecayed", ["nothing", "biases", "vectors"])
def test_what_decay_spares_is_an_option(captioned_store, undecayed):
    store = open_store(captioned_store)
    config = TrainConfig(
        features=None,
        out=None,
        task="retrieval",
        learning_rate=1e-4,
        weight_decay=0.2,
        optimizer="adamw",
        undecayed=undecayed,
    )
    head = build(store, interaction="wti")
    optimizer = make_optimizer(head.parameter_groups(), config, find_optimisation(config), find_biases(head))
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(list(head.parameters()))
    for name, parameter in head.named_parameters():
        group, is_bias = group_of[id(parameter)], name.endswith("bias")
        spared = {"nothing": False, "biases": is_bias, "vectors": is_bias or "norm" in name or name == "logit_scale"}
        assert group["weight_decay"] == (0.0 if spared[undecayed] else 0.2), name
        assert group["rate_share"] == (1e-3 if name.startswith(("end.", "logit_scale")) else 1.0), name


@pytest.mark.parametrize("interaction", ["mean", "wti"])
def test_a_rate_that_is_far_too_high_is_told_in_one_line(interaction, captioned_store, tmp_path):
    config = config_for(captioned_store, tmp_path / "run", learning_rate=1e30, interaction=interaction, epochs=1)
    with pytest.raises(EnvironmentFailedError, match="became NaN or infinite in epoch 1.*Lower --learning-rate"):
        train_run(config)


# What retrieval did before it was the reference's.
BEFORE = dict(
    interaction="wti",
    optimizer="adamw",
    undecayed="vectors",
    set=("normalises_frames=true", "decorrelation=0.001", "trains_end=false", "trains_logit_scale=false"),
)


def test_a_killed_run_from_before_goes_on_as_it_was_begun(captioned_store, tmp_path, interrupted, assert_same_run):
    """Its folder tells none of the options that are younger than it. What it was begun with goes on with it."""
    train_run(config_for(captioned_store, tmp_path / "whole", **BEFORE))
    with interrupted(retrieval, "contrastive_loss", 5):
        train_run(config_for(captioned_store, tmp_path / "run", **BEFORE))
    saved = json.loads((tmp_path / "run/config.json").read_text())
    saved["train"]["set"] = []
    for place, names in (
        ("train", ("optimizer", "undecayed")),
        ("head", ("normalises_frames", "decorrelation", "trains_end", "trains_logit_scale")),
    ):
        for name in names:
            del saved[place][name]
    (tmp_path / "run/config.json").write_text(json.dumps(saved))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train_run(config_for(captioned_store, tmp_path / "run", interaction="wti", resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert evaluate_run(tmp_path / "run")["text_to_video"] == evaluate_run(tmp_path / "whole")["text_to_video"]
    for against in (dict(optimizer="uncorrected-adam"), dict(undecayed="biases"), dict(interaction="mean")):
        ((name, value),) = against.items()
        with pytest.raises(RunExistsError, match=f"was begun with other settings: .*{name} .* there, {value} here"):
            train_run(config_for(captioned_store, tmp_path / "other", resume=True, **against))
    with pytest.raises(RunExistsError, match="begun with other settings: .*trains_end=None.* there, .*trains_end=True"):
        train_run(config_for(captioned_store, tmp_path / "other", resume=True, set=("trains_end=true",)))


def test_a_presets_interaction_is_taken_where_none_is_given(captioned_store, tmp_path, monkeypatch):
    """The tiny store as if its backbone were a paper's."""
    (paper,) = (preset for preset in PRESETS if preset.name == "b16-msrvtt")
    tiny = replace(paper, depth=6, layers=tuple(range(6)), sizes={**paper.sizes, "side_width": 64})
    monkeypatch.setattr(Side4Video, "presets", (tiny,))
    monkeypatch.setattr(type(tiny), "is_beside", lambda *_: True)
    store = open_store(captioned_store)
    for given, expected in (
        ({}, "wti"),
        ({"interaction": "mean"}, "mean"),
        ({"negatives": "all"}, "mean"),
        ({"preset": "none"}, "mean"),
    ):
        config = resolve_preset(config_for(captioned_store, None, **{"preset": "b16-msrvtt", **given}), store)
        assert config.interaction == expected, given
        assert (config.optimizer, config.undecayed, config.clip_norm) == ("uncorrected-adam", "biases", 1.0)
        shape = plan_network(config, store)
        assert (shape.normalises_frames, shape.decorrelation) == (False, 0.0)
        assert shape.trains_end and shape.trains_logit_scale
    given = resolve_preset(config_for(captioned_store, None, optimizer="adamw", undecayed="nothing"), store)
    assert (given.optimizer, given.undecayed) == ("adamw", "nothing")
    with pytest.raises(ConfigError, match="--negatives all compares means"):
        config_for(captioned_store, None, preset="b16-msrvtt", negatives="all", interaction="wti")


def test_the_references_negatives_count_pairs_that_are_right_too(captioned_store):
    """By brute force: every other pair of the step."""
    store = open_store(captioned_store)
    task, head = Retrieval(config_for(captioned_store, None, negatives="reference"), store), build(store)
    chosen = task.training.labels[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    texts = TextReader(store).read(chosen)
    batch = ClipBatch(None, None, None, torch.from_numpy(chosen), hand_over_texts(texts, CPU))
    frames = torch.randn(12, 3, store.layout.embed_dim, generator=torch.Generator().manual_seed(0))
    found = task.compute_loss(head, frames, batch, lambda values: values)
    similarities = head.interaction(batch.texts, frames).similarities
    torch.testing.assert_close(found, contrastive_loss(similarities, head.logit_scale))
    usual = Retrieval(config_for(captioned_store, None), store).compute_loss(head, frames, batch, lambda values: values)
    assert usual < found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(set=("decorrelation=0.001",)), "--set decorrelation has no effect on means"),
        (dict(set=("decorrelation=-1",), interaction="wti"), "--set decorrelation takes a number from 0 up; found -1"),
        (dict(set=("trains_end=false",), task="recognition"), "--set trains_end has no effect but on --task retrieval"),
        (dict(optimizer="sgd"), "--optimizer takes adamw, uncorrected-adam; found 'sgd'"),
        (dict(undecayed="norms"), "--undecayed takes nothing, biases, vectors; found 'norms'"),
    ],
)
def test_options_of_the_recipe_are_checked(captioned_store, options, message):
    with pytest.raises(ConfigError, match=message):
        plan_network(config_for(captioned_store, None, **options), open_store(captioned_store))


def test_a_store_without_texts_leaves_no_run_behind(captioned_store, tmp_path):
    bare = shutil.copytree(captioned_store, tmp_path / "bare.zarr", ignore=shutil.ignore_patterns("text"))
    with pytest.raises(StoreMismatchError, match="holds no texts of its captions"):
        train_run(config_for(bare, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_there_were_tasks_goes_on(int8_store, tmp_path):
    config = dict(features=int8_store, out=tmp_path / "run", head="linear", epochs=1, device="cpu")
    train_run(TrainConfig(**config))
    saved = json.loads((tmp_path / "run/config.json").read_text())
    for name in ("task", "interaction", "negatives"):
        del saved["train"][name]
    (tmp_path / "run/config.json").write_text(json.dumps(saved))
    assert train_run(TrainConfig(**config, resume=True))["epochs"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(head="linear"), "--task retrieval trains side4video; found --head linear"),
        (dict(inputs="pixels"), "--inputs pixels leaves out the class token"),
        (dict(label_smoothing=0.1), "--label-smoothing has no effect on --task retrieval"),
        (dict(task="search"), "--task takes recognition, retrieval; found 'search'"),
        (dict(interaction="dot"), "--interaction takes mean, wti; found 'dot'"),
        (dict(task="recognition", interaction="wti"), "--interaction and --negatives have no effect on --task recog"),
        (dict(batch_size=1), "a step of one pair has no negatives"),
        (dict(negatives="all", interaction="wti"), "--negatives all compares means"),
        (dict(preset="b16-k400"), "--preset b16-k400 is not for --task retrieval"),
        (dict(task="recognition", preset="b16-msrvtt"), "--preset b16-msrvtt is not for --task recognition"),
    ],
)
def test_what_does_not_fit_retrieval_is_refused(changes, message, captioned_store, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_run(config_for(captioned_store, tmp_path / "run", **changes))


def test_stores_that_cannot_train_retrieval_are_refused(int8_store, captioned_store, tmp_path):
    with pytest.raises(StoreMismatchError, match="has no good, captioned video in split 'train'"):
        train_run(config_for(int8_store, tmp_path / "run"))
    with pytest.raises(StoreMismatchError, match="the backbone's last block, 5; --layers ends with 3"):
        train_run(config_for(captioned_store, tmp_path / "run", layers=(1, 3)))
    assert len(TextReader(open_store(captioned_store))) == 19


def test_runs_of_the_other_task_are_refused(trained, captioned_store, int8_store, tmp_path):
    with pytest.raises(ConfigError, match="--clips has no effect on a retrieval run"):
        evaluate_run(trained[0], num_clips=2)
    train_run(TrainConfig(features=int8_store, out=tmp_path / "linear", head="linear", epochs=1, device="cpu"))
    with pytest.raises(ConfigError, match="--dual-softmax has no effect on a recognition run"):
        evaluate_run(tmp_path / "linear", with_dual_softmax=True)
    with pytest.raises(StoreMismatchError, match="has no good, captioned video in split 'test'; it has train, val"):
        evaluate_run(trained[0], split="test")


def test_the_commands_train_and_evaluate(captioned_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    command = ["train", "--features", str(captioned_store), "--task", "retrieval", "--epochs", "1"]
    options = ["--side-width", "64", "--device", "cpu", "--batch-size", "4"]
    result = runner.invoke(app, [*command, *options], catch_exceptions=False)
    assert result.exit_code == 0 and "runs/captioned-retrieval: best and last val_r1" in result.stdout
    assert find_newest_run(accept=lambda run: run.shape.task == "retrieval").name == "captioned-retrieval"
    result = runner.invoke(app, ["eval", "--dual-softmax", "--device", "cpu"], catch_exceptions=False)
    lines = result.stdout.splitlines()
    assert "4 videos and 6 captions of val" in lines[0]
    told = [line.split("  ")[0] for line in lines[2:]]
    assert told == [name for name in ("trained", "frozen", "trained, dual softmax") for _ in range(2)]
    result = runner.invoke(app, ["eval", "--clips", "2"])
    assert result.exit_code == 1 and "--clips has no effect on a retrieval run" in result.stderr


def test_a_run_can_begin_with_the_network_of_another_task(captioned_store, int8_store, tmp_path):
    recognition = dict(features=int8_store, epochs=1, batch_size=4, side_width=64, device="cpu")
    train_run(TrainConfig(**recognition, out=tmp_path / "classes", learning_rate=1e-2))
    begun = config_for(captioned_store, tmp_path / "run", epochs=1, learning_rate=1e-12, init=tmp_path / "classes")
    train_run(begun)
    old, new = (load_file(tmp_path / name / "best.safetensors") for name in ("classes", "run"))
    for name in ("stem.weight", "taps.0.project.weight", "blocks.5.mlp.2.weight"):
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-9)
    torch.testing.assert_close(new["position"][1:], old["position"], rtol=0, atol=1e-9)
    assert new["widen.weight"].abs().max() < 1e-9, "what ranks is still the frozen backbone"
    train_run(TrainConfig(**recognition, out=tmp_path / "again", init=tmp_path / "run"))
    with pytest.raises(StoreMismatchError, match="classes .--init. does not fit: its network has other sizes"):
        train_run(config_for(captioned_store, tmp_path / "wide", side_width=128, init=tmp_path / "classes"))
    assert not (tmp_path / "wide").exists()
    with pytest.raises(ConfigError, match="--init has no effect on --head linear"):
        TrainConfig(features=int8_store, out=tmp_path / "x", head="linear", init=tmp_path / "run")
