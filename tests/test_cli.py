"""The command as a user meets it: real entry, exit code, stdout, stderr."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s4v.cli import app

EXTRACT = ["extract", "--model", "tiny-clip", "--weights", "random", "--frames", "4", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def fails(code, message, *arguments):
    """One clear line on stderr, nothing on stdout, no traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    as_json = run(*arguments, "--json")
    assert as_json.exit_code == code
    answer = json.loads(as_json.stdout.strip().splitlines()[-1])
    assert answer["ok"] is False
    assert message in answer["error"]["message"]


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom s4v.cli import app\n"
        "assert 'extract' in CliRunner().invoke(app, ['--help']).output\n"
        "print(sorted({'torch', 'open_clip', 'tensorstore', 'pyarrow', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_three_lines_of_the_user(video_folder, tmp_path, monkeypatch):
    """With data in the default places; the models' own weights are not to be had here, so random ones."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(video_folder, tmp_path / "data" / "k400")
    extracted = run(*EXTRACT, "--dataset", "k400", "--json")
    assert extracted.exit_code == 0, extracted.output
    answer = json.loads(extracted.stdout.strip().splitlines()[-1])
    assert answer["command"] == "extract"
    assert answer["ok"] is True
    assert answer["store"] == "store/k400.zarr"
    assert answer["videos"] == {"ok": 10, "failed": 1, "pending": 0}
    assert answer["failed"][0]["video_id"] == "train/walk/broken.mp4"
    assert answer["seconds"] > 0

    trained = run("train", "--features", "store/k400.zarr", "--epochs", "1", "--side-width", "64", "--device", "cpu")
    assert trained.exit_code == 0, trained.output
    assert trained.stdout.startswith("runs/k400-side4video: best and last val_top1")

    found = run("retrieve", "--query", "a person runs", "--top", "3")
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0].split() == ["rank", "score", "best", "frame", "moment", "path"]
    assert len(lines) == 4
    assert "random weights" in found.stderr

    evaluated = run("eval", "--json")
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads(evaluated.stdout.strip().splitlines()[-1])["videos"] == 2


def test_three_lines_say_what_is_missing_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(
        1,
        "the videos of 'k400' were expected in data/k400: no such folder",
        "extract",
        "--model",
        "vit-e",
        "--dataset",
        "k400",
    )
    fails(1, "store/k400.zarr is not a store: nothing there", "train", "--features", "store/k400.zarr")
    fails(1, "no store in", "retrieve", "--query", "text")
    fails(1, "no run in", "eval")
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_wrong_input_is_one_clear_line(video_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("file,label\na.mp4,run\n")
    folder = [*EXTRACT, "--dataset", "folder", "--root", video_folder]
    fails(1, "nowhere: no such folder", *EXTRACT, "--dataset", "folder", "--root", "nowhere")
    fails(1, "empty holds no video", *EXTRACT, "--dataset", "folder", "--root", "empty")
    fails(1, "unknown model 'vit-b61'. Closest:", *folder, "--model", "vit-b61")
    fails(1, "--layers must lie in 0 to 5", *folder, "--layers", "1,77")
    fails(1, "--frames takes a number", *folder, "--frames", "many")
    fails(1, "unknown data set 'k4000'. Closest: k400", *EXTRACT, "--dataset", "k4000")
    table = [*EXTRACT, "--dataset", "table", "--root", video_folder, "--annotations", "list.csv"]
    fails(1, "no clip", *table, "--column", "path=clip")
    fails(1, "--column takes ROLE=NAME", *table, "--column", "path")
    fails(1, "is not a store", "info", tmp_path)
    fails(1, "is not a run", "eval", "--run", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "list.csv"]


def test_odd_places_for_a_store_are_one_clear_line(video_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    folder = [*EXTRACT, "--dataset", "folder", "--root", video_folder]
    fails(1, "file", *folder, "--out", "file/x.zarr")
    fails(1, "File name too long", *folder, "--out", "x" * 300)
    fails(1, "--column is for --dataset table, not for folder", *folder, "--column", "path=x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_library_of_the_same_name_in_the_users_folder_is_not_imported(video_folder, tmp_path):
    (tmp_path / "av.py").write_text("raise SystemExit('the user's own file was imported')")
    s4v = Path(sys.executable).with_name("s4v")
    command = [s4v, "scan", "--dataset", "folder", "--root", video_folder, "--out", "scan.parquet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_usage_errors_exit_with_2():
    assert run("extract", "--dataset", "k400").exit_code == 2
    assert run("nonsense").exit_code == 2


def test_strict_exits_with_3_when_a_video_failed(video_folder, tmp_path):
    arguments = [*EXTRACT, "--dataset", "folder", "--root", video_folder, "--out", tmp_path / "s.zarr"]
    arguments += ["--dtype", "float32"]
    assert run(*arguments, "--strict").exit_code == 3
    result = run(*arguments)
    assert result.exit_code == 0
    assert "10 videos ok, 1 failed, 0 pending" in result.stdout
    assert "train/walk/broken.mp4: unreadable" in result.stdout


def test_info_says_what_a_store_holds(int8_store):
    result = run("info", int8_store)
    assert result.exit_code == 0
    for text in (
        "10 ok, 1 failed, 0 pending",
        "1 unreadable",
        "tiny-clip",
        "random:0",
        "int8, 192 of 192 channels",
        "train: 9 (frames 6); val: 2 (frames 4)",
        "(11, 1, 6, 6, 64, 192)",
    ):
        assert text in result.stdout
    facts = json.loads(run("info", int8_store, "--json").stdout)
    assert facts["arrays"]["patches"]["shape"] == [11, 1, 6, 6, 64, 192]
    assert facts["failures"] == {"unreadable": 1}
    on_disk = sum(p.stat().st_size for p in int8_store.rglob("*") if p.is_file())
    assert facts["bytes"] == on_disk


def test_info_warns_of_layers_that_lost_much(int8_store, tmp_path):
    shutil.copytree(int8_store, tmp_path / "s.zarr")
    file = tmp_path / "s.zarr" / "fidelity.json"
    told = json.loads(file.read_text())
    assert "lost more than" not in run("info", tmp_path / "s.zarr").output
    told["layers"][1]["variance_kept"] = 0.94
    file.write_text(json.dumps(told))
    layer = told["layers"][1]["layer"]
    assert f"layers {layer} lost more than 5% of their variance" in run("info", tmp_path / "s.zarr").output


# `s4v` with shards that take a while: the signal comes in the middle of the work, however fast or busy the machine.
SLOW_SHARDS = """
import time
from s4v import cli
from s4v.store.writer import StoreWriter
write = StoreWriter.write_shard
def write_late(*arguments, **options):
    time.sleep(0.4)
    write(*arguments, **options)
StoreWriter.write_shard = write_late
cli.main()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_keeps_finished_shards_and_exits_with_130(tmp_path, make_video, monkeypatch):
    for number in range(8):
        make_video(tmp_path / f"v/train/{'ab'[number % 2]}/{number}.mp4", seed=number)
    options = [*EXTRACT, "--dtype", "float32", "--dataset", "folder", "--root", "v", "--out", "s.zarr", "--json"]
    # Shells start what they put into the background, these tests perhaps, with Ctrl-C ignored; children inherit that.
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SHARDS, *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("s.zarr/_parts/[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted; finished shards are kept, the same command continues" in err
    assert "Traceback" not in err
    assert json.loads(out.strip().splitlines()[-1])["error"]["type"] == "Interrupted"
    markers = {path: path.stat().st_mtime_ns for path in tmp_path.glob("s.zarr/_parts/[0-9]*")}
    assert 1 <= len(markers) < 8
    monkeypatch.chdir(tmp_path)
    done = run(*options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.strip().splitlines()[-1])["videos"] == {"ok": 8, "failed": 0, "pending": 0}
    assert {path: path.stat().st_mtime_ns for path in markers} == markers, "they are not done anew"
