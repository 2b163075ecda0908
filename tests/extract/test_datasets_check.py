"""`s4v datasets`: what is known, and a folder checked against it."""

import json

import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError
from s4v.extract.datasets import FACTS, DatasetFacts, check_folder, frame_rate, resolve_protocol


def run(*arguments):
    return CliRunner().invoke(app, ["datasets", *map(str, arguments)], catch_exceptions=False)


K400 = "label,youtube_id,time_start,time_end,split\nabseiling,-3B32lodo2M,59,69,train\nzumba,0wR5jVB-WPk,1,11,train\n"


def test_facts_are_keyed_by_name_and_counts_by_protocol():
    for name, facts in FACTS.items():
        assert isinstance(facts, DatasetFacts)
        assert facts.name == name
        assert set(facts.counts) <= set(facts.protocols or ("",))
        assert facts.layout
        assert facts.source
        assert facts.clip_settings
    assert list(FACTS) == sorted(FACTS, key=lambda name: (FACTS[name].recipe.network is not None, name))
    assert frame_rate("ssv1") == 12
    assert frame_rate("folder") is None


def test_protocols_default_to_the_first_and_are_refused_elsewhere():
    assert resolve_protocol("msrvtt", None) == "1k-A-9k"
    assert resolve_protocol("k400", None) is None
    with pytest.raises(ConfigError, match="--protocol has no effect on --dataset k400; found 'split1'"):
        resolve_protocol("k400", "split1")


def test_a_folder_is_checked_against_annotations_and_official_counts(place):
    root = place({"train.csv": K400}, "train/abseiling/-3B32lodo2M_000059_000069.mp4", "train/x/other.mp4")
    found = check_folder("k400", root)
    assert found["splits"] == {
        "train": {"listed": 2, "expected": 246_535, "missing": 1},
        "val": {"listed": 0, "expected": 19_907, "missing": 0},
    }
    assert found["missing"] == ["train/zumba/0wR5jVB-WPk_000001_000011.mp4"]
    assert found["unlisted"] == 1
    assert (found["classes"], found["expected_classes"]) == (2, 400)


def test_command_lists_all_and_describes_one():
    listed = run()
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(FACTS)
    one = run("msrvtt")
    assert "layout     MSRVTT_data.json" in one.stdout
    assert "expected   full: train 6513, val 497, test 2990" in one.stdout
    assert "protocols  1k-A-9k, 1k-A-7k, full" in one.stdout
    assert len(json.loads(run("--json").stdout)["datasets"]) == len(FACTS)
    assert json.loads(run("ssv1", "--json").stdout)["frame_fps"] == 12


def test_command_checks_a_folder(place):
    root = place({"train.csv": K400}, "train/abseiling/-3B32lodo2M_000059_000069.mp4")
    result = run("k400", "--root", root)
    assert result.exit_code == 0
    assert "train    2 listed, 246535 expected, 1 not on the disk" in result.stdout
    assert "classes  2 found, 400 expected" in result.stdout
    assert "missing: train/zumba/0wR5jVB-WPk_000001_000011.mp4" in result.stdout
    assert json.loads(run("k400", "--root", root, "--json").stdout)["unlisted"] == 0


def test_command_refuses_what_it_cannot_check(tmp_path):
    for arguments, message in (
        (("k40",), "unknown data set 'k40'"),
        (("table",), "table is no public data set"),
        (("k400", "--root", tmp_path / "none"), "no such folder"),
        (("ucf101", "--root", tmp_path, "--protocol", "x"), "--protocol takes split1"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stdout == ""
