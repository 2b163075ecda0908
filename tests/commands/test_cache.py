"""`s4v cache`."""

import json

from typer.testing import CliRunner

from s4v.cli import app
from s4v.store.reader import open_store
from s4v.store.shard_cache import ShardCache


def run(*words):
    return CliRunner().invoke(app, ["cache", *map(str, words)])


def test_a_cache_is_shown_and_cleared(int8_store, tmp_path):
    store = open_store(int8_store)
    store.read_through(ShardCache(tmp_path / "cache", 10**9), waits=True)
    store.read_clips([0], [[0, 1]])
    told = run(tmp_path / "cache", "--json")
    facts = json.loads(told.stdout)
    assert told.exit_code == 0 and facts["removed_bytes"] is None
    assert [(one["store"], one["files"]) for one in facts["stores"]] == [(str(int8_store), 3)]
    assert f"{int8_store}: 3 files, " in run(tmp_path / "cache").stdout
    cleared = run(tmp_path / "cache", "--clear")
    assert " removed" in cleared.stdout and not list((tmp_path / "cache").glob("*/*.c.*"))
    assert json.loads(run(tmp_path / "cache", "--json").stdout)["bytes"] == 0


def test_what_is_no_cache_is_refused(tmp_path):
    told = run(tmp_path)
    assert told.exit_code == 1 and "is no cache of s4v" in told.output
