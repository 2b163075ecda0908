"""What an evaluation makes of clips, crops and scores, each by hand."""

import json
import logging
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import EnvironmentFailedError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.store.manifest import read_table
from s4v.store.reader import open_store
from s4v.train import clips, scorer
from s4v.train.clips import find_captioned_rows, find_labelled_rows
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks.side4video import Side4Video
from s4v.train.run_folder import load_checkpoint, open_run
from s4v.train.scorer import Scorer, Team, autocast_as_trained
from s4v.train.tasks.recognition import evaluate_classes
from s4v.train.tasks.recognition_metrics import Evaluation, describe_classes, find_calibration_error
from s4v.train.tasks.recognition_page import _plot_curve, write_results
from s4v.train.tasks.retrieval import embed_clips

CPU = torch.device("cpu")


def config_for(store, out, **changes):
    values = dict(features=store, out=out, epochs=1, batch_size=4, side_width=64, device="cpu", warmup_epochs=0.5)
    return TrainConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def several(video_folder, make_config, tmp_path_factory):
    """Validation rows of three crops and two clips of 4 frames, sampled as the reference does."""
    out = tmp_path_factory.mktemp("several") / "s.zarr"
    options = dict(frames={"train": 6, "": 8}, clips={"": 2}, views={"val": "three"}, sampling="reference-sth")
    extract_dataset(make_config(video_folder, out, **options))
    return out


def same_evaluation(folder, other, said):
    """Whether two folders of a run were evaluated alike; `said` is what each printed."""
    one, two = ({k: v for k, v in json.loads(line).items() if k not in ("run", "seconds")} for line in said)
    tables = sorted(path.name for path in folder.glob("*_train.parquet"))
    assert tables
    return one == two and all(read_table(folder / name).equals(read_table(other / name)) for name in tables)


def test_processes_share_the_clips_of_an_evaluation(trained_by_two, tmp_path):
    said = (trained_by_two / "said").read_text().strip().splitlines()[-1]
    leave_out = shutil.ignore_patterns("*_train.*")
    run = shutil.copytree(trained_by_two / "plain", tmp_path / "plain", ignore=leave_out)
    alone = CliRunner().invoke(app, ["eval", "--run", str(run), "--split", "train", "--device", "cpu", "--json"])
    assert same_evaluation(trained_by_two / "plain", run, (said, alone.stdout.strip().splitlines()[-1]))


@pytest.mark.slow
def test_processes_share_the_texts_of_an_evaluation(trained_by_two, processes_run, tmp_path):
    """As documented: without the dashes torchrun takes --run for a beginning of its own --run-path."""
    one, two = (shutil.copytree(trained_by_two / "retrieval", tmp_path / name) for name in ("one", "two"))
    command = ["eval", "--split", "train", "--device", "cpu", "--json", "--run"]
    done = processes_run(2, "-m", "--", "s4v", *command, str(two))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    alone = CliRunner().invoke(app, [*command, str(one)])
    assert same_evaluation(one, two, (alone.stdout.strip().splitlines()[-1], line))


@pytest.fixture(scope="module")
def trained(several, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train_run(config_for(several, out))
    return out


def test_a_videos_probabilities_are_the_mean_softmax_of_its_clips_and_crops(several, trained):
    run, store = open_run(trained), open_store(several)
    data, head = find_labelled_rows(store, "val"), load_checkpoint(run, "last")
    mean, std = (np.float32(store.attributes["backbone"][name]) for name in ("mean", "std"))
    probabilities = []
    for row, recorded in zip(data.rows, data.eval_clips, strict=True):
        scores = []
        for view in range(3):
            for frames in recorded:
                clips = store.read_clips([row], [frames], view=view)
                pixels = (clips.pixels[:, :, 0].astype(np.float32) / 255 - mean) / std
                with torch.inference_mode():
                    logits = head(
                        torch.from_numpy(pixels).permute(0, 1, 4, 2, 3),
                        torch.from_numpy(store.decode_patches(clips.patches)),
                        torch.from_numpy(clips.cls).float(),
                    )[0].double()
                scores.append((logits - logits.max()).exp() / (logits - logits.max()).exp().sum())
        assert len(scores) == 6
        probabilities.append(torch.stack(scores).mean(0).numpy())
    expected = np.stack(probabilities)
    figures = evaluate_run(trained, checkpoint="last")
    assert figures["loss"] == pytest.approx(-np.log(expected[np.arange(2), data.labels]).mean(), rel=1e-4)
    assert figures["top1"] == (expected.argmax(1) == data.labels).mean()
    assert figures["videos"] == 2 and figures["clips_per_video"] == "as recorded"


@pytest.mark.parametrize("head", ["side4video", "linear", "attentive"])
def test_a_bf16_evaluation_agrees_with_a_count_from_its_own_scores(int8_store, tmp_path, head):
    """The last product is float32: scores of 16 bits tie, and figures then disagree about them."""
    side_width = {"side_width": None} if head == "linear" else {}
    config = config_for(int8_store, tmp_path / "run", head=head, precision="bf16", **side_width)
    train_run(config)
    figures = evaluate_run(config.out, checkpoint="last")
    table = read_table(config.out / "predictions_val.parquet")
    names = open_run(config.out).classes
    scores = np.asarray(table["probabilities"].to_pylist(), dtype=np.float32)
    labels = np.asarray([names.index(name) for name in table["class_name"].to_pylist()])
    assert scores.shape == (figures["videos"], len(names))
    assert figures["top1"] == (scores.argmax(1) == labels).mean() == np.mean(table["is_correct"].to_pylist())
    assert table["predicted"].to_pylist() == [names[place] for place in scores.argmax(1)]
    assert (scores != torch.from_numpy(scores).bfloat16().float().numpy()).any(), "scores are finer than 16 bits"
    run = open_run(config.out)
    network = load_checkpoint(run, "last")
    logits = []
    network.classifier.register_forward_hook(lambda module, inputs, output: logits.append(output))
    evaluate_classes(
        Scorer(
            network, open_store(int8_store), layers=run.shape.layers, num_frames=run.frames, batch_size=4, device=CPU,
            team=Team(autocast=autocast_as_trained(run, CPU)),
        ),
        find_labelled_rows(open_store(int8_store), "val"),
    )  # fmt: skip
    assert all(one.dtype == torch.float32 for one in logits)
    assert any((one != one.bfloat16().float()).any() for one in logits)


def test_clips_that_are_too_short_are_refused_with_both_numbers(several, trained, tmp_path):
    """They would be filled up by showing frames twice."""
    message = r"the run's clips have 6 frames, evaluation clips of .*s\.zarr as few as 4\. Use --frames 4 .*or extract"
    with pytest.raises(StoreMismatchError, match=message):
        train_run(config_for(several, tmp_path / "six", frames=6))
    assert not (tmp_path / "six").exists()
    train_run(config_for(several, tmp_path / "none", epochs=1))
    assert open_run(tmp_path / "none").frames == 4, "left open, clips are as long as evaluation's"
    store, head = open_store(several), load_checkpoint(open_run(trained))
    longer = Scorer(head, store, layers=open_run(trained).shape.layers, num_frames=6, batch_size=4, device=CPU)
    data = find_labelled_rows(store, "val")
    with pytest.raises(StoreMismatchError, match=message):
        evaluate_classes(longer, data)
    assert evaluate_classes(longer, data, num_clips=1).rows.tolist() == data.rows.tolist()
    with pytest.raises(StoreMismatchError, match=message):
        embed_clips(longer, data)


def test_a_thinned_clip_of_the_references_is_told_once(several, trained, int8_store, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train_run(config_for(several, tmp_path / "two", frames=2, epochs=2))
    told = [record.message for record in caplog.records if "not the reference's clip" in record.message]
    assert len(told) == 1 and "are 4 frames by reference-sth; the 2 that are taken" in told[0]
    caplog.clear()
    evaluate_run(tmp_path / "two")
    assert caplog.text.count("not the reference's clip") == 1
    caplog.clear()
    evaluate_run(trained)
    train_run(config_for(int8_store, tmp_path / "uniform", frames=2))
    assert "not the reference's clip" not in caplog.text


def test_a_teams_shares_are_the_whole_in_order(several, trained, monkeypatch):
    """Two processes, one after the other: each takes every second batch, and both know all scores."""
    store, run = open_store(several), open_run(trained)
    data = find_labelled_rows(store, "val")
    alone = Scorer(load_checkpoint(run), store, layers=run.shape.layers, num_frames=4, batch_size=5, device=CPU)
    whole = evaluate_classes(alone, data)
    parts = {}
    for rank in range(2):
        monkeypatch.setattr(Team, "gather", lambda team, own: parts.setdefault(team.rank, own))
        with pytest.raises(ValueError):  # half of the scores do not fit all clips
            evaluate_classes(replace(alone, team=Team(rank, 2)), data)
    monkeypatch.undo()
    assert [len(parts[rank]) for rank in range(2)] == [2, 1]

    def gather(found, _own):
        found[:] = [parts[0], parts[1]]

    monkeypatch.setattr(scorer.dist, "all_gather_object", gather)
    for rank in range(2):
        shared = evaluate_classes(replace(alone, team=Team(rank, 2)), data)
        assert np.array_equal(shared.probabilities, whole.probabilities)


def test_validation_and_evaluation_run_in_the_precision_of_training(int8_store, tmp_path, monkeypatch):
    seen = []

    def watch(head, inputs):
        seen.append((head.training, torch.is_autocast_enabled("cpu"), inputs[2].dtype))

    built = Side4Video.build

    def build(kind, shape):
        head = built(kind, shape)
        head.register_forward_pre_hook(watch)
        return head

    monkeypatch.setattr(Side4Video, "build", build)
    train_run(config_for(int8_store, tmp_path / "bf16", precision="bf16"))
    assert {(True, True, torch.float32), (False, True, torch.float32)} == set(seen), "inputs stay as they are"
    run = open_run(tmp_path / "bf16")
    with autocast_as_trained(run, CPU)():
        assert torch.is_autocast_enabled("cpu")
    for precision in ("fp16", "fp32", None):
        with autocast_as_trained(replace(run, config={**run.config, "precision": precision}), CPU)():
            assert not torch.is_autocast_enabled("cpu")
    assert evaluate_run(tmp_path / "bf16", checkpoint="last")["loss"] == pytest.approx(
        float(re.search(r'"val_loss": ([\d.]+)', (tmp_path / "bf16/metrics.jsonl").read_text())[1]), rel=1e-6
    )


def evaluation(labels, probabilities):
    return Evaluation(np.arange(len(labels)), np.array(labels), np.array(probabilities, np.float32), 0.0)


def test_calibration_and_classes_by_hand():
    """Confidences 0.9 and 0.9 in one bin, one right: off by 0.4. 0.6 and 0.5 each alone, right and wrong."""
    result = evaluation([0, 1, 1, 2], [[0.9, 0.1, 0.0], [0.9, 0.05, 0.05], [0.2, 0.6, 0.2], [0.5, 0.3, 0.2]])
    assert find_calibration_error(result) == pytest.approx((2 * 0.4 + 0.4 + 0.5) / 4, abs=1e-6)
    assert describe_classes(result, ("a", "b", "c", "d")) == [
        {"class": "a", "videos": 1, "accuracy": 1.0, "precision": pytest.approx(1 / 3)},
        {"class": "b", "videos": 2, "accuracy": 0.5, "precision": 1.0},
        {"class": "c", "videos": 1, "accuracy": 0.0, "precision": None},
    ], "no video is of d"


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []
        self.text = []

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, name, value) for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_results_page_is_self_contained_and_names_confused_pairs(trained, several):
    run, store = open_run(trained), open_store(several)
    figures = evaluate_run(trained)
    data = find_labelled_rows(store, "val")
    wrong = Evaluation(data.rows, data.labels, np.eye(2, dtype=np.float32)[1 - data.labels], 1.0)
    write_results(run, store, wrong, {**figures, "top1": 0.0}, "val")
    page = (trained / "results_val.html").read_text()
    links = Links()
    links.feed(page)
    assert links.found, "curves and frames"
    assert all(value.startswith("data:") for _, _, value in links.found), links.found
    assert not re.search(r"@import|url\((?!data:)|<script[^>]+src", page)
    text = " ".join(word for part in links.text for word in part.split())
    assert re.search(
        r"true predicted videos of the class (run walk 1 100% walk run|walk run 1 100% run walk) 1 100%", text
    )
    assert "walk, predicted run" in text


def test_a_full_device_says_what_to_do(int8_store, several, trained, tmp_path, monkeypatch):
    def fill(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore of it")

    with monkeypatch.context() as patch:
        patch.setattr("s4v.train.tasks.recognition.classification_loss", fill)
        with pytest.raises(
            EnvironmentFailedError,
            match="does not suffice .*20.00 GiB.*: train with --checkpoint-activations.*--batch-size.*--accumulate",
        ):
            train_run(config_for(int8_store, tmp_path / "run"))
    monkeypatch.setattr("s4v.train.tasks.recognition.evaluate_classes", fill)
    with pytest.raises(EnvironmentFailedError, match="memory does not suffice .*: evaluate with --device cpu"):
        evaluate_run(trained)


def test_first_clips_of_captioned_rows_are_checked(captioned_store):
    store = open_store(captioned_store)
    data = find_captioned_rows(store, "val")
    short = replace(data, eval_clips=[[clip[0][:2], clip[0]] for clip in data.eval_clips])
    with pytest.raises(StoreMismatchError, match="evaluation clips of .* as few as 2"):
        clips.require_long_clips(short, 4, store, only_first=True)
    clips.require_long_clips(replace(data, eval_clips=[clip[:1] for clip in data.eval_clips]), 4, store)


def test_a_curve_of_one_epoch_is_a_dot():
    """A line of one point shows nothing."""
    figure, axes = plt.subplots()
    _plot_curve(axes, [1], [3.5], color="black")
    _plot_curve(axes, [1, 2], [3.5, 3.0], color="black", linestyle=":")
    assert [line.get_marker() for line in axes.get_lines()] == ["o", "None"]
    plt.close(figure)
