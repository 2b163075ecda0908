import json
import logging
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from s4v.errors import (
    ConfigError,
    EnvironmentFailedError,
    RunExistsError,
    RunNotFoundError,
    StoreDamagedError,
    StoreMismatchError,
    StoreNotFoundError,
)
from s4v.extract.extraction import extract_dataset
from s4v.store import manifest
from s4v.store.reader import open_store
from s4v.train import loop
from s4v.train.clips import ClipLoader, find_labelled_rows, plan_training_epoch
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.fabric import resolve_device
from s4v.train.loop import default_run_path, train_run
from s4v.train.networks import find_network
from s4v.train.networks.attentive_probe import AttentiveProbe, embed_times
from s4v.train.recipe import learning_rate_at, reference_learning_rate
from s4v.train.run_folder import find_newest_run, load_checkpoint, open_run, read_metrics
from s4v.train.tasks import recognition as tasks
from s4v.train.tasks.recognition_metrics import Evaluation


def build(shape):
    return find_network(shape.name).build(shape)


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=2, batch_size=4, side_width=64, device="cpu", warmup_epochs=1.0)
    return TrainConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def trained(int8_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "side"
    summary = train_run(config_for(int8_store, out))
    return out, summary


def test_a_run_leaves_configuration_metrics_and_checkpoints(trained, int8_store):
    out, summary = trained
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "stats.json", "best.safetensors", "best.json", "last.safetensors"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    metrics = read_metrics(open_run(out))
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert {"train_loss", "learning_rate", "val_loss", "val_top1"} <= set(metrics[0])
    assert summary["steps"] == 4
    assert 0 <= summary["data_wait_share"] <= 1
    saved = json.loads((out / "config.json").read_text())
    assert saved["train"]["frames"] == 4, "resolved, not None"
    assert saved["classes"] == ["run", "walk"]
    assert saved["source"]["codec"]["sha256"] == open_store(int8_store).codec.sha256


def test_the_same_seed_gives_the_same_run(trained, int8_store, tmp_path):
    out, _ = trained
    train_run(config_for(int8_store, tmp_path / "again"))
    assert (tmp_path / "again/metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    assert (tmp_path / "again/last.safetensors").read_bytes() == (out / "last.safetensors").read_bytes()
    train_run(config_for(int8_store, tmp_path / "other", seed=1))
    assert (tmp_path / "other/metrics.jsonl").read_text() != (out / "metrics.jsonl").read_text()


@pytest.mark.parametrize("inputs", ["pixels", "tokens"])
def test_ablations_train_and_evaluate_from_their_saved_configuration(int8_store, tmp_path, inputs):
    train_run(config_for(int8_store, tmp_path / "run", inputs=inputs))
    assert open_run(tmp_path / "run").shape.inputs == inputs
    assert evaluate_run(tmp_path / "run", checkpoint="last")["videos"] == 2


def test_tokens_suffice_where_a_store_has_no_pixels(video_folder, make_config, tmp_path):
    extract_dataset(make_config(video_folder, tmp_path / "s.zarr", with_pixels=False))
    with pytest.raises(
        StoreMismatchError, match="extracted with --no-pixels.*Train with --inputs tokens or --head linear"
    ):
        train_run(config_for(tmp_path / "s.zarr", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert train_run(config_for(tmp_path / "s.zarr", tmp_path / "run", inputs="tokens"))["epochs"] == 2


def test_inputs_are_checked(int8_store, tmp_path):
    with pytest.raises(ConfigError, match="--inputs takes all, tokens, pixels; found 'sound'"):
        config_for(int8_store, tmp_path / "run", inputs="sound")
    with pytest.raises(ConfigError, match="^--inputs has no effect on --head linear"):
        train_run(config_for(int8_store, tmp_path / "run", head="linear", inputs="pixels", side_width=None))
    with pytest.raises(ConfigError, match="--side-width and --inputs have no effect on --head linear"):
        train_run(config_for(int8_store, tmp_path / "run", head="linear", inputs="pixels"))


def test_backwards_shows_every_clip_from_its_end(trained, int8_store, monkeypatch):
    out, _ = trained
    shown = []
    load = ClipLoader.load

    def watch(loader, plans):
        shown.append(np.concatenate([plan.places for plan in plans]))
        return load(loader, plans)

    monkeypatch.setattr(ClipLoader, "load", watch)
    forwards = evaluate_run(out, checkpoint="last")
    backwards = evaluate_run(out, checkpoint="last", is_backwards=True)
    assert np.array_equal(shown[0], shown[1][:, ::-1])
    assert forwards["loss"] != backwards["loss"]
    assert {"eval_val_backwards.json", "predictions_val_backwards.parquet"} <= {p.name for p in out.iterdir()}


def test_evaluation_gives_the_validation_figures_again(trained):
    out, _ = trained
    figures = evaluate_run(out, checkpoint="last")
    last = read_metrics(open_run(out))[-1]
    assert figures["top1"] == last["val_top1"]
    assert figures["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert figures["videos"] == 2
    assert np.sum(figures["confusion"]) == 2
    assert (out / "eval_val.json").exists()
    assert evaluate_run(out, split="train", num_clips=1)["videos"] == 8


def test_mixed_precision_trains(int8_store, tmp_path):
    summary = train_run(config_for(int8_store, tmp_path / "bf16", precision="bf16"))
    assert math.isfinite(summary["last"]["train_loss"])
    assert evaluate_run(tmp_path / "bf16")["videos"] == 2


def test_linear_probe_is_blind_to_the_order_of_frames(int8_store, tmp_path):
    train_run(config_for(int8_store, tmp_path / "linear", head="linear", side_width=None))
    head = load_checkpoint(open_run(tmp_path / "linear"))
    cls = torch.randn(2, 5, 6, 192)
    torch.testing.assert_close(head(None, None, cls), head(None, None, cls.flip(1)))


def test_a_step_of_one_clip_is_refused_for_the_linear_probe(int8_store, tmp_path):
    with pytest.raises(ConfigError, match="a step of one clip has no statistics .*--batch-size 2 or more"):
        train_run(config_for(int8_store, tmp_path / "run", head="linear", side_width=None, batch_size=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_given", [True, False], ids=["given", "by the preset"])
def test_views_of_a_video_stand_side_by_side_in_a_step(video_folder, tmp_path, make_config, monkeypatch, is_given):
    extract_dataset(make_config(video_folder, tmp_path / "s.zarr", views={"train": "flip"}))
    seen, load = [], ClipLoader.load

    def watch(loader, plans):
        seen.extend(plans)
        return load(loader, plans)

    monkeypatch.setattr(ClipLoader, "load", watch)
    config = config_for(tmp_path / "s.zarr", tmp_path / "run", epochs=1, val_split="train")
    if is_given:
        config = replace(config, views_per_video=2)
    else:
        monkeypatch.setattr("s4v.train.preparation.resolve_views", lambda *_: 2)
    assert train_run(config)["steps"] == 4, "of two videos each"
    for plan in seen[:4]:
        rows, counts = np.unique(plan.rows, return_counts=True)
        assert len(rows) == 2 and counts.tolist() == [2, 2]
        assert sorted(plan.views.tolist()) == [0, 0, 1, 1]
    saved = json.loads((tmp_path / "run/config.json").read_text())["train"]
    assert saved["views_per_video"] == 2
    with pytest.raises(ConfigError, match="--views-per-video must be at least 1; found 0"):
        replace(config, views_per_video=0)


def test_layers_of_the_store_can_be_left_out(int8_store, tmp_path):
    train_run(config_for(int8_store, tmp_path / "few", layers=(1, 5), epochs=1))
    assert open_run(tmp_path / "few").shape.layers == (1, 5)
    evaluate_run(tmp_path / "few")


def test_a_run_evaluates_on_another_codec_of_the_same_tokens(trained, float_store):
    out, _ = trained
    assert evaluate_run(out, features=float_store)["videos"] == 2


def test_class_order_of_another_store_does_not_matter(trained, tmp_path, float_store):
    """The same names listed in another order: labels are translated by name."""
    out, _ = trained
    expected = evaluate_run(out, features=float_store)
    swapped = tmp_path / "swapped.zarr"
    shutil.copytree(float_store, swapped)
    (swapped / "checksums.json").unlink()
    metadata = json.loads((swapped / "zarr.json").read_text())
    metadata["attributes"]["s4v"]["classes"]["names"].reverse()
    (swapped / "zarr.json").write_text(json.dumps(metadata))
    table = manifest.read_table(swapped / "videos.parquet")
    labels = [1 - label for label in table["label"].to_pylist()]
    column = table.schema.get_field_index("label")
    swapped_labels = table.set_column(column, table.schema.field(column), pa.array(labels, pa.int32()))
    manifest.write_table(swapped / "videos.parquet", swapped_labels)
    found = evaluate_run(out, features=swapped)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6), "a label under another name would cost more"
    assert found["confusion"] == expected["confusion"]
    mistaken = find_labelled_rows(open_store(swapped), "val")
    assert not np.array_equal(mistaken.labels, find_labelled_rows(open_store(float_store), "val").labels)


def test_store_of_another_backbone_or_class_list_is_refused_with_all_differences(
    trained, video_folder, tmp_path, make_config
):
    out, _ = trained
    root = tmp_path / "videos"
    shutil.copytree(video_folder, root)
    (root / "train/walk").rename(root / "train/crawl")
    other = tmp_path / "other.zarr"
    extract_dataset(make_config(root, other, seed=7, resize="224", layers="0", limit=1))
    with pytest.raises(StoreMismatchError) as caught:
        evaluate_run(out, features=other)
    message = str(caught.value)
    for part in (
        "backbone weights_sha256",
        "resize: 224 in the store, 256 in the run",
        "layers [1, 2, 3, 4] are not in the store",
        "classes: only in the store ['crawl']",
    ):
        assert part in message


def test_existing_run_is_never_overwritten(trained, int8_store):
    out, _ = trained
    before = (out / "config.json").read_bytes()
    with pytest.raises(RunExistsError, match="exists. Nothing was overwritten"):
        train_run(config_for(int8_store, out))
    assert (out / "config.json").read_bytes() == before


def test_wrong_input_is_refused_before_anything_is_written(int8_store, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(StoreNotFoundError, match="is not a store: nothing there"):
        train_run(config_for(tmp_path / "none.zarr", out))
    with pytest.raises(ConfigError, match="--head takes side4video, linear, attentive, tds-clip, dist; found 'mlp'"):
        train_run(config_for(int8_store, out, head="mlp"))
    with pytest.raises(ConfigError, match="--precision fp16 needs a CUDA GPU"):
        train_run(config_for(int8_store, out, precision="fp16"))
    with pytest.raises(ConfigError, match="--side-width must be a multiple of 64"):
        train_run(config_for(int8_store, out, side_width=65))
    with pytest.raises(ConfigError, match="--side-width has no effect on --head linear"):
        train_run(config_for(int8_store, out, head="linear"))
    with pytest.raises(StoreMismatchError, match="holds layers 0,1,2,3,4,5, wanted 1,9: missing 9"):
        train_run(config_for(int8_store, out, layers=(1, 9)))
    with pytest.raises(StoreMismatchError, match="no good, labelled video in split 'dev'. It has train: 8 labelled ok"):
        train_run(config_for(int8_store, out, train_split="dev"))
    with pytest.raises(StoreMismatchError, match="has no split 'vla' .--val-split.; it has train, val"):
        train_run(config_for(int8_store, out, val_split="vla"))
    with pytest.raises(ConfigError, match="--learning-rate must be a number above 0; found nan"):
        config_for(int8_store, out, learning_rate=math.nan)
    with pytest.raises(ConfigError, match="--epochs must be at least 1"):
        config_for(int8_store, out, epochs=0)
    assert not out.exists()


def test_what_is_not_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunNotFoundError, match="is not a run: nothing there"):
        open_run(tmp_path / "none")
    with pytest.raises(RunNotFoundError, match="no run in"):
        find_newest_run()


def test_damaged_checkpoint_is_refused(trained, tmp_path):
    out, _ = trained
    copied = tmp_path / "copy"
    shutil.copytree(out, copied)
    file = copied / "best.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StoreDamagedError, match=r"best\.safetensors is damaged"):
        load_checkpoint(open_run(copied))


def test_a_flipped_byte_in_a_checkpoint_is_refused(trained, tmp_path):
    out, _ = trained
    copied = tmp_path / "copy"
    shutil.copytree(out, copied)
    file = copied / "best.safetensors"
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreDamagedError, match=r"best\.safetensors is damaged: it does not match the hash"):
        load_checkpoint(open_run(copied))
    with pytest.raises(RunNotFoundError, match="has no checkpoint 'middle'; it has best, last"):
        load_checkpoint(open_run(copied), "middle")


def test_garbled_configuration_is_no_run(trained, tmp_path):
    out, _ = trained
    for content in ((out / "config.json").read_text()[:-60], "[]", "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(RunNotFoundError, match=r"config\.json is not a run's configuration"):
            open_run(tmp_path)


def test_a_single_step_changes_the_weights(int8_store, tmp_path):
    summary = train_run(config_for(int8_store, tmp_path / "one", epochs=1, batch_size=32))
    assert summary["steps"] == 1
    assert summary["last"]["learning_rate"] > 0
    torch.manual_seed(0)
    initial = build(open_run(tmp_path / "one").shape).state_dict()
    trained_weights = load_checkpoint(open_run(tmp_path / "one"), "last").state_dict()
    assert not torch.equal(initial["classifier.weight"], trained_weights["classifier.weight"])


def test_learning_rate_follows_the_reference_by_backbone(int8_store, tmp_path):
    train_run(config_for(int8_store, tmp_path / "r", epochs=1))
    assert open_run(tmp_path / "r").config["learning_rate"] == 1e-3
    assert [reference_learning_rate(width) for width in (192, 768, 1024, 1792)] == [1e-3, 1e-3, 1e-4, 1e-4]


def test_evaluation_refuses_clips_that_the_store_cannot_give(trained, video_folder, tmp_path, make_config):
    out, _ = trained
    extract_dataset(make_config(video_folder, tmp_path / "two.zarr", frames={"": 2}))
    with pytest.raises(StoreMismatchError, match="a clip of 4 frames was asked for, rows of .* hold as few as 2"):
        evaluate_run(out, features=tmp_path / "two.zarr")
    with pytest.raises(StoreMismatchError, match="9 clips of 4 frames were asked for.*at most --clips 1"):
        evaluate_run(out, num_clips=9)


def test_moved_store_says_what_to_do(trained, tmp_path):
    out, _ = trained
    copied = tmp_path / "copy"
    shutil.copytree(out, copied)
    config = json.loads((copied / "config.json").read_text())
    config["source"]["store"] = str(tmp_path / "gone.zarr")
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreNotFoundError, match="the run's own store has gone.*Name where it is now: --features"):
        evaluate_run(copied)


def test_unfinished_store_trains_with_a_warning(video_folder, tmp_path, make_config, caplog):
    extract_dataset(make_config(video_folder, tmp_path / "half.zarr", limit=7))
    train_run(config_for(tmp_path / "half.zarr", tmp_path / "run", epochs=1))
    assert "half.zarr is not finished: " in caplog.text


def test_a_clusters_variables_do_not_matter(int8_store, tmp_path, monkeypatch):
    for name, value in (("SLURM_NTASKS", "4"), ("SLURM_JOB_NAME", "x"), ("SLURM_JOB_ID", "1")):
        monkeypatch.setenv(name, value)
    train_run(config_for(int8_store, tmp_path / "run", epochs=1))


def test_scores_that_are_not_finite_are_never_an_accuracy():
    result = Evaluation(np.arange(2), np.array([0, 1]), np.full((2, 3), np.nan, np.float32), math.nan)
    assert result.top(1) == 0.0


def test_the_first_bad_loss_names_its_step_and_its_own_videos(int8_store, tmp_path, monkeypatch):
    """The check looks back over many steps: what came after a bad one is bad too, and innocent."""
    seen, loss = [], tasks.classification_loss

    def spoil(*arguments):
        seen.append(None)
        return loss(*arguments) * (math.nan if len(seen) == 11 else 1)

    monkeypatch.setattr(tasks, "classification_loss", spoil)
    config = config_for(int8_store, tmp_path / "nan", batch_size=1, accumulate=2)
    store = open_store(int8_store)
    data = find_labelled_rows(store, "train")
    # The 11th batch: the first half of the second step of the second epoch; both of its batches are told.
    plans = plan_training_epoch(data, num_frames=4, batch_size=1, seed=0, epoch=1)[2:4]
    rows = [int(plan.rows[0]) for plan in plans]
    ids = store.read_manifest(["video_id"])["video_id"].take(rows).to_pylist()
    message = f"the loss became NaN or infinite in epoch 2, in step 6 (videos {ids[0]}, {ids[1]}). Lower"
    with pytest.raises(EnvironmentFailedError, match=re.escape(message)):
        train_run(config)
    assert load_checkpoint(open_run(tmp_path / "nan"), "last") is not None, "of the first epoch"


def test_a_state_with_weights_that_are_not_finite_is_never_saved(int8_store, tmp_path, monkeypatch):
    """A loss is finite until the next batch shows what its step did."""
    make, steps = loop.make_optimizer, []

    def poison(groups, *options, **named):
        optimizer = make(groups, *options, **named)

        def ruin(*_):
            steps.append(None)
            if len(steps) == 2:
                groups[0].parameters[0].data.fill_(math.inf)

        optimizer.register_step_post_hook(ruin)
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", poison)
    with pytest.raises(EnvironmentFailedError, match="a weight became NaN or infinite in epoch 1, at or before step 2"):
        train_run(config_for(int8_store, tmp_path / "run", batch_size=2, checkpoint_minutes=0.0))
    kept = load_file(tmp_path / "run/state.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values()), "that of the first step"


def test_classes_without_a_training_video_are_told_once(video_folder, tmp_path, make_config, make_video, caplog):
    root = tmp_path / "videos"
    shutil.copytree(video_folder, root)
    for name in ("fly", "swim"):
        make_video(root / f"val/{name}/0.mp4", seed=40)
    extract_dataset(make_config(root, tmp_path / "s.zarr"))
    with caplog.at_level(logging.WARNING):
        train_run(config_for(tmp_path / "s.zarr", tmp_path / "run"))
    told = [record.getMessage() for record in caplog.records if "cannot be learnt" in record.getMessage()]
    assert told == [
        "2 of 4 classes have no good training video and cannot be learnt: 'fly', 'swim'. "
        "2 validation videos are of them."
    ]


def test_precision_is_resolved_and_written_down(int8_store, tmp_path, monkeypatch):
    config = config_for(int8_store, tmp_path / "run")
    assert resolve_device(config) == ("cpu", "fp32")
    emulates = lambda including_emulation=True: including_emulation  # noqa: E731 (as a V100 answers)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
    assert resolve_device(replace(config, device="auto")) == ("cuda", "fp16"), "emulated bf16 is no bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_device(replace(config, device="auto")) == ("cuda", "bf16")
    assert resolve_device(replace(config, device="cuda", precision="fp32")) == ("cuda", "fp32")
    monkeypatch.undo()
    train_run(config)
    saved = json.loads((tmp_path / "run/config.json").read_text())["train"]
    assert (saved["precision"], saved["device_type"], saved["views_per_video"]) == ("fp32", "cpu", 1)


def test_a_run_does_not_go_on_in_another_precision(int8_store, tmp_path, caplog):
    config = config_for(int8_store, tmp_path / "run", precision="bf16")
    train_run(config)
    with pytest.raises(RunExistsError, match="begun with other settings: precision bf16 there, fp32 here"):
        train_run(replace(config, precision=None, resume=True))
    train_run(replace(config, resume=True))
    assert "goes on on" not in caplog.text
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    saved["train"]["device_type"] = "cuda"
    path.write_text(json.dumps(saved))
    train_run(replace(config, resume=True))
    assert "was begun on cuda and goes on on cpu" in caplog.text
    # As runs were written before all of this was resolved.
    saved["train"]["precision"] = None
    del saved["train"]["device_type"], saved["train"]["views_per_video"]
    path.write_text(json.dumps(saved))
    train_run(replace(config, precision=None, resume=True))
    assert evaluate_run(tmp_path / "run")["videos"] == 2


def test_weights_that_are_not_finite_are_never_a_checkpoint(int8_store, tmp_path):
    with pytest.raises(EnvironmentFailedError, match="became NaN or infinite in epoch 1.*No epoch was finished"):
        train_run(config_for(int8_store, tmp_path / "w", learning_rate=1e30, epochs=1))
    assert not list((tmp_path / "w").glob("*.safetensors"))


def test_loss_that_is_not_finite_stops_the_run_and_names_the_step(int8_store, tmp_path):
    with pytest.raises(
        EnvironmentFailedError, match=r"the loss became NaN or infinite in epoch \d.*Lower --learning-rate"
    ):
        train_run(config_for(int8_store, tmp_path / "nan", learning_rate=1e30, epochs=6))


def test_default_run_path_takes_a_free_name(tmp_path):
    first = default_run_path(tmp_path / "k400.zarr", "linear", folder=tmp_path)
    assert first == tmp_path / "k400-linear"
    first.mkdir()
    assert default_run_path(tmp_path / "k400.zarr", "linear", folder=tmp_path) == tmp_path / "k400-linear-2"
    assert default_run_path(tmp_path / "k400.zarr", "linear", resume=True, folder=tmp_path) == first
    assert default_run_path(tmp_path / "new.zarr", "linear", resume=True, folder=tmp_path) == tmp_path / "new-linear"


def test_learning_rate_warms_up_and_falls_as_a_cosine(tmp_path):
    config = config_for(tmp_path, tmp_path, epochs=30, warmup_epochs=4.0, learning_rate=1e-3)
    assert learning_rate_at(0, config) == 0
    assert learning_rate_at(2, config) == pytest.approx(5e-4)
    assert learning_rate_at(4, config) == pytest.approx(1e-3)
    assert learning_rate_at(17, config) == pytest.approx(5e-4)
    assert learning_rate_at(30, config) == pytest.approx(0, abs=1e-12)
    short = replace(config, epochs=2)
    assert learning_rate_at(1, short) == pytest.approx(1e-3), "a short run still reaches its rate"


def test_accuracy_counts_ties_against_us():
    scores = np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]], np.float32)
    result = Evaluation(np.arange(4), np.array([0, 1, 0, 2]), scores, math.nan)
    assert result.top(1) == 1 / 4
    assert result.top(2) == 2 / 4
    assert result.top(3) == 1.0
    assert result.confusion().sum() == 4


@pytest.mark.parametrize("task", ["recognition", pytest.param("retrieval", marks=pytest.mark.slow)])
def test_training_loads_no_backbone_and_nothing_of_extract(task, int8_store, captioned_store, tmp_path, data_path):
    """By the real entry; and no file of a run holds a block of the backbone."""
    store = captioned_store if task == "retrieval" else int8_store
    code = f"""
import sys
from s4v import cli
def run(*arguments):
    sys.argv = ["s4v", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, arguments
out = {str(tmp_path / task)!r}
run("train", "--features", {str(store)!r}, "--task", {task!r}, "--out", out, "--epochs", 1, "--side-width", 64,
    "--batch-size", 4, "--device", "cpu")
run("eval", "--run", out)
run("import", {str(data_path / "recognition_clip/checkpoint.pt")!r}, "--out", {str(tmp_path / "imported")!r})
print(sorted(m for m in sys.modules if m.startswith(("open_clip", "timm", "s4v.extract", "decord"))))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().splitlines()[-1] == "[]"
    width = open_store(int8_store).layout.width
    of_blocks = {(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)}
    files = list(tmp_path.glob("re*/*.safetensors"))
    assert {file.name for file in files} == {"best.safetensors", "last.safetensors", "state.safetensors"}
    assert len(files) == 3
    for file in files:
        network = build(open_run(file.parent).shape).state_dict()
        tensors = load_file(file)
        if file.stem != "state":
            assert tensors.keys() == network.keys()
        for name, tensor in tensors.items():
            assert not name.removeprefix("head.").startswith(("visual", "transformer", "resblocks", "token_embedding"))
            assert tuple(tensor.shape) not in of_blocks or name.endswith("end.project.weight"), name


def test_the_attentive_probe_trains_and_knows_the_order_of_frames(int8_store, tmp_path):
    train_run(config_for(int8_store, tmp_path / "run", head="attentive", layers=(3, 5)))
    run = open_run(tmp_path / "run")
    assert (run.shape.name, run.shape.layers, run.shape.side_width) == ("attentive", (3, 5), 64)
    assert evaluate_run(tmp_path / "run")["videos"] == 2
    head = load_checkpoint(run)
    patches, cls = torch.randn(2, 4, 2, 64, 192), torch.randn(2, 4, 2, 192)
    assert not torch.allclose(head(None, patches, cls), head(None, patches.flip(1), cls))
    order = torch.randperm(64)
    torch.testing.assert_close(head(None, patches, cls), head(None, patches[:, :, :, order], cls), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="--inputs has no effect on --head attentive"):
        train_run(config_for(int8_store, tmp_path / "other", head="attentive", inputs="tokens"))


def attend_as_written(probe, patches, cls, codec=None):
    """The attentive probe by its formula: keys and values of every token of every layer, and attention over them."""
    tokens = []
    for place, tap in enumerate(probe.taps):
        one = patches[:, :, place]
        read = tap(one) if codec is None else tap.read_codes(one, codec, place)
        tokens.append(read + probe.layer[place])
    x = torch.stack(tokens, dim=2)
    b, t, _, _, s = x.shape
    x = x + embed_times(t, s, x.device)[:, None, None]
    keys, values = probe.keys_values(x.flatten(1, 3)).chunk(2, dim=-1)
    query = probe.query.expand(b, 1, s)
    q, k, v = (y.unflatten(-1, (probe.num_heads, -1)).transpose(1, 2) for y in (query, keys, values))
    pooled = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)
    return probe.classifier(probe.norm(pooled + probe.mlp(probe.mlp_norm(pooled))))


@pytest.mark.parametrize("side_width", [128, 192])
def test_the_attentive_probe_is_its_formula_without_its_memory(side_width):
    torch.manual_seed(0)
    probe = AttentiveProbe(num_layers=3, width=24, side_width=side_width, num_classes=5).double()
    for parameter in (probe.query, probe.layer, probe.keys_values.bias):
        torch.nn.init.normal_(parameter, std=2.0)
    patches, cls = torch.randn(2, 4, 3, 50, 24).double(), torch.randn(2, 4, 3, 24).double()
    found, largest = [], []
    known = {parameter.data_ptr() for parameter in probe.parameters()} | {patches.data_ptr()}
    for answer in (probe, lambda *inputs: attend_as_written(probe, *inputs[1:])):
        probe.zero_grad()
        stored = {}

        def keep(tensor, stored=stored):
            stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = answer(None, patches, cls)
        largest.append(max(size for place, size in stored.items() if place not in known))
        (out * torch.linspace(-1, 1, 5)).sum().backward()
        found.append([out.detach(), *(parameter.grad.clone() for parameter in probe.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # times are waves in float32
    of_a_layer = 2 * 4 * 50 * side_width
    assert largest[1] >= 3 * 2 * of_a_layer, "keys and values of all layers"
    # A wide probe keeps no tokens at all, the folded query and its results are larger.
    assert largest[0] <= of_a_layer if side_width < 192 else largest[0] < of_a_layer
