import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from s4v.errors import (
    ConfigError,
    EnvironmentFailedError,
    RunExistsError,
    RunNotFoundError,
    StoreDamagedError,
    StoreMismatchError,
    StoreNotFoundError,
)
from s4v.extract.pipeline import extract_dataset
from s4v.store import manifest
from s4v.store.reader import open_store
from s4v.train.clips import ClipLoader, find_labelled_rows
from s4v.train.config import TrainConfig
from s4v.train.evaluate import Evaluation, evaluate_run
from s4v.train.heads import build_head
from s4v.train.loop import default_run_path, train_run
from s4v.train.recipe import learning_rate_at, reference_learning_rate
from s4v.train.run import find_newest_run, load_checkpoint, open_run, read_metrics


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
    assert open_run(tmp_path / "run").head.inputs == inputs
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


def test_layers_of_the_store_can_be_left_out(int8_store, tmp_path):
    train_run(config_for(int8_store, tmp_path / "few", layers=(1, 5), epochs=1))
    assert open_run(tmp_path / "few").head.layers == (1, 5)
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
    with pytest.raises(ConfigError, match="--head takes side4video, linear, attentive; found 'mlp'"):
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
    initial = build_head(open_run(tmp_path / "one").head).state_dict()
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


def test_training_loads_no_backbone_and_nothing_of_extract(int8_store, tmp_path, data_path):
    checkpoint = data_path / "recognition_clip/checkpoint.pt"
    code = (
        "import sys\nfrom pathlib import Path\nfrom s4v.train.config import TrainConfig\n"
        "from s4v.train.loop import train_run\nfrom s4v.train.evaluate import evaluate_run\n"
        f"train_run(TrainConfig(features=Path({str(int8_store)!r}), out=Path({str(tmp_path / 'run')!r}), epochs=1,"
        " side_width=64, device='cpu'))\n"
        f"evaluate_run({str(tmp_path / 'run')!r})\n"
        "from s4v.train.importing import import_checkpoint\n"
        f"import_checkpoint(Path({str(checkpoint)!r}), Path({str(tmp_path / 'imported')!r}))\n"
        "print(sorted(m for m in sys.modules if m.startswith(('open_clip', 'timm', 's4v.extract', 'decord'))))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().splitlines()[-1] == "[]"


def test_the_attentive_probe_trains_and_knows_the_order_of_frames(int8_store, tmp_path):
    train_run(config_for(int8_store, tmp_path / "run", head="attentive", layers=(3, 5)))
    run = open_run(tmp_path / "run")
    assert (run.head.name, run.head.layers, run.head.side_width) == ("attentive", (3, 5), 64)
    assert evaluate_run(tmp_path / "run")["videos"] == 2
    head = load_checkpoint(run)
    patches, cls = torch.randn(2, 4, 2, 64, 192), torch.randn(2, 4, 2, 192)
    assert not torch.allclose(head(None, patches, cls), head(None, patches.flip(1), cls))
    order = torch.randperm(64)
    torch.testing.assert_close(head(None, patches, cls), head(None, patches[:, :, :, order], cls), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="--inputs has no effect on --head attentive"):
        train_run(config_for(int8_store, tmp_path / "other", head="attentive", inputs="tokens"))
