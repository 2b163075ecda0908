import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError
from s4v.store.reader import open_store
from s4v.train import compare
from s4v.train.compare import compare_methods
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.networks import NETWORKS
from s4v.train.networks.side4video import Side4Video
from s4v.train.networks.zero_shot import ZeroShotText, score_class_names
from s4v.train.paper.presets import SIZES
from s4v.train.recipe import Recipe
from s4v.train.tasks.recognition_metrics import find_interval


def base_for(store, out):
    return TrainConfig(features=store, out=out, epochs=1, batch_size=4, device="cpu")


def test_all_methods_stand_in_one_table_and_nothing_is_trained_twice(int8_store, tmp_path, monkeypatch):
    said = []
    methods = ("linear", "attentive", "side4video", "zero-shot")
    base = base_for(int8_store, tmp_path / "c")
    lines = compare_methods(base, methods=methods, seeds=2, say=said.append)
    assert [line.method for line in lines] == ["linear", "attentive", "side4video"]
    assert said[-1] == "no zero-shot: the backbone of this store has random weights"
    for line in lines:
        assert line.parameters > 0 and line.videos == 2
        assert line.interval[0] <= line.top1 <= line.interval[1]
        assert line.deviation is not None and line.top5 is None and line.epochs == 1
    table = (tmp_path / "c/compare.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in table) == 5 and table[2].startswith("| linear | class tokens")
    assert {line.count("|") for line in table if line.startswith("|")} == {12}
    assert len(json.loads((tmp_path / "c/compare.json").read_text())["methods"]) == 3

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("s4v.train.tasks.recognition.classification_loss", refuse)
    assert compare_methods(base_for(int8_store, tmp_path / "c"), methods=methods, seeds=2) == lines


def test_all_are_trained_as_long_as_the_side_network(int8_store, tmp_path, monkeypatch):
    """A preset is the side network's alone: without it the probes would have s4v's 30 epochs."""
    tiny, recipe = replace(SIZES["b16"], depth=6), Recipe(2, 1e-3, 0.5, batch_size=4)
    preset = tiny.beside("recognition", "b16", "k400", recipe, {"side_width": 64})
    monkeypatch.setattr(Side4Video, "presets", (preset,))
    monkeypatch.setattr(
        "s4v.train.settings.find_preset", lambda config, _: "b16-k400" if config.head == "side4video" else None
    )
    base = TrainConfig(features=int8_store, out=tmp_path / "c", device="cpu")
    lines = compare_methods(base, methods=("linear", "side4video"))
    assert [line.epochs for line in lines] == [2, 2]
    saved = [json.loads((tmp_path / f"c/{m}-0/config.json").read_text())["train"] for m in ("linear", "side4video")]
    assert [one["batch_size"] for one in saved] == [4, 4] and [one["warmup_epochs"] for one in saved] == [0.5, 0.5]
    assert "| epochs |" in (tmp_path / "c/compare.md").read_text()


def test_wrong_options_are_refused(int8_store, tmp_path):
    with pytest.raises(ConfigError, match="takes side4video, linear, attentive, tds-clip, dist, zero-shot; found mlp"):
        compare_methods(base_for(int8_store, tmp_path / "c"), methods=("linear", "mlp"))
    with pytest.raises(ConfigError, match="--seeds must be at least 1; found 0"):
        compare_methods(base_for(int8_store, tmp_path / "c"), seeds=0)
    with pytest.raises(ConfigError, match="--prompt must hold {}, the place of a class's name; found 'a video'"):
        score_class_names(open_store(int8_store), "val", prompt="a video")
    assert not (tmp_path / "c").exists()


def test_zero_shot_stands_beside_what_was_trained(int8_store, tmp_path, monkeypatch):
    def ask(_kind, store, split, **options):
        assert split == "val" and options == {"prompt": "{}"}
        return np.array([[0.1, 0.9], [0.5, 0.5]]), np.array([1, 0])

    monkeypatch.setattr(ZeroShotText, "score", ask)
    base = base_for(int8_store, tmp_path / "c")
    (line,) = compare_methods(base, methods=("zero-shot",), untrained={"prompt": "{}"})
    assert (line.top1, line.videos, line.parameters, line.mean_class_accuracy) == (0.5, 2, 0, 0.5), "a tie is wrong"


def test_the_command_prints_the_table(int8_store, tmp_path, monkeypatch):
    command = ["compare", "--features", str(int8_store), "--out", str(tmp_path / "c"), "--methods", "linear"]
    kept = []
    monkeypatch.setattr("s4v.train.allocator.keep_freed_memory", lambda: kept.append(True))
    result = CliRunner().invoke(app, [*command, "--epochs", "1", "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0 and "| linear |" in result.stdout
    assert kept == [True], "as `s4v train` does"


def test_intervals_are_wilsons():
    """Against published values for 8 of 10, 0 of 10 and 10 of 10."""
    assert find_interval(0.8, 10) == pytest.approx((0.4901, 0.9433), abs=2e-4)
    assert find_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=2e-4)
    assert find_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=2e-4)
    assert find_interval(0.5, 0) == (0.0, 1.0)
    assert compare.list_methods()[-1] == "zero-shot"


def test_a_probes_rate_is_chosen_on_held_out_training_videos(int8_store, tmp_path):
    base = base_for(int8_store, tmp_path / "c")
    side, line = compare_methods(base, methods=("side4video", "linear"))
    saved = json.loads((tmp_path / "c/linear-choice/sweep.json").read_text())
    kind = NETWORKS["linear"]
    assert len(saved["heads"]) == len(kind.tried_rates) * len(kind.tried_decays) > 1 and saved["held_out_videos"] == 1
    assert (line.learning_rate, line.weight_decay) == tuple(
        saved["winner"][k] for k in ("learning_rate", "weight_decay")
    )
    run = json.loads((tmp_path / "c/linear-0/config.json").read_text())["train"]
    assert run["learning_rate"] == line.learning_rate and run["hold_out"] is None, "trained on all"
    assert side.choice is None and f"were chosen of {len(saved['heads'])}" in line.choice
    (difference,) = line.differences
    assert difference.other == "side4video" and difference.difference == pytest.approx(line.top1 - side.top1)
    text = (tmp_path / "c/compare.md").read_text()
    assert line.choice in text and "beside side4video, paired 95 %" in text
    assert "linear" in (tmp_path / "c/compare.html").read_text()


def test_a_rate_that_is_given_is_everybodys(int8_store, tmp_path):
    base = replace(base_for(int8_store, tmp_path / "c"), learning_rate=2e-3)
    (line,) = compare_methods(base, methods=("linear",))
    assert line.learning_rate == 2e-3 and line.choice is None and not (tmp_path / "c/linear-choice").exists()


def test_a_comparison_from_before_goes_on_as_it_was_begun(int8_store, tmp_path):
    base = base_for(int8_store, tmp_path / "c")
    old = TrainConfig(
        features=int8_store, out=base.out / "linear-0", head="linear", epochs=1, batch_size=4, device="cpu",
        learning_rate=1e-3,
    )  # fmt: skip
    train_run(old)
    (line,) = compare_methods(base, methods=("linear",))
    assert line.learning_rate == 1e-3 and line.choice is None


def test_runs_that_are_there_are_compared_pair_by_pair(int8_store, tmp_path):
    for name, rate in (("a", 1e-3), ("b", 3e-2), ("c", 1e-4)):
        config = replace(base_for(int8_store, tmp_path / name), head="linear", learning_rate=rate)
        train_run(config)
    command = ["compare", "--features", str(int8_store), "--out", str(tmp_path / "out"), "--device", "cpu", "--json"]
    runs = [word for name in "abc" for word in ("--run", str(tmp_path / name))]
    result = CliRunner().invoke(app, [*command, *runs, "--split", "train"], catch_exceptions=False)
    answer = json.loads(result.stdout.splitlines()[-1])
    assert [len(one["differences"]) for one in answer["runs"]] == [0, 1, 2]
    shares = {one["run"]: one["share"] for one in answer["runs"]}
    for one in answer["runs"]:
        for pair in one["differences"]:
            assert pair["difference"] == pytest.approx(one["share"] - shares[pair["other"]]) and pair["videos"] == 8
            assert pair["interval"][0] <= pair["difference"] <= pair["interval"][1]
    assert "paired difference" in (tmp_path / "out/compare.md").read_text()
    with pytest.raises(ConfigError, match="--run takes two or more different runs"):
        compare.compare_runs([tmp_path / "a"], features=int8_store)


def test_runs_of_retrieval_are_compared_by_their_recall(captioned_store, tmp_path):
    for name in "ab":
        out, seed = tmp_path / name, ord(name)
        config = replace(base_for(captioned_store, out), task="retrieval", side_width=64, seed=seed)
        train_run(config)
    first, second = compare.compare_runs([tmp_path / "a", tmp_path / "b"], features=captioned_store, device="cpu")
    assert first["figure"] == "r1" and second["questions"] > second["differences"][0]["videos"] == 4
