"""A disk that is full in the middle of an extraction: a small file system of our own, in a namespace of our own."""

import re
import subprocess
import sys

import pytest

from s4v.store.reader import open_store
from s4v.store.verify import verify_store

# The extraction refuses to start where it cannot fit: here it is not asked, so that the disk fills in the middle.
EXTRACT = """
import sys
import s4v.extract.extraction as extraction
from s4v.cli import main
if "--unasked" in sys.argv:
    sys.argv.remove("--unasked")
    extraction.require_space = lambda *_, **__: None
main()
"""

SCRIPT = """
set -u
mount -t tmpfs -o size=6200k none "$1/disk"
shift_extract() { "$PYTHON" -c "$EXTRACT" extract --model tiny-clip --weights random --dataset folder --root "$ROOT" \
  --out "$DISK/s.zarr" --frames train=6,4 --dtype float32 --device cpu --decoders 1 "$@"; echo "exit $?"; }
shift_extract
shift_extract --unasked
ls "$DISK/s.zarr/_parts" | wc -l
mount -o remount,size=100m "$DISK"
shift_extract
cp -r "$DISK/s.zarr" "$1/after.zarr"
"""


def run_in_namespace(*command, **options):
    return subprocess.run(["unshare", "--user", "--map-root-user", "--mount", *command], **options)


@pytest.fixture
def namespaces():
    try:
        allowed = run_in_namespace("true", capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("no file system of our own can be mounted here (unshare --user --mount)")


@pytest.mark.slow
def test_a_full_disk_names_the_shard_and_the_same_command_continues(
    namespaces, video_folder, float_store, contents, tmp_path
):
    (tmp_path / "disk").mkdir()
    variables = {"PYTHON": sys.executable, "EXTRACT": EXTRACT, "ROOT": str(video_folder)}
    ran = run_in_namespace(
        *("env", f"DISK={tmp_path / 'disk'}", *(f"{name}={value}" for name, value in variables.items())),
        *("sh", "-c", SCRIPT, "sh", str(tmp_path)),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("exit") or line.strip().isdecimal()]
    assert lines[0] == "exit 1", "refused at the start, for it cannot fit"
    assert re.search(r"needs \d+\.\d MB more and its disk has \d\.\d MB free", ran.stderr)
    assert lines[1] == "exit 5"
    assert 1 <= int(lines[2]) < 11, "some shards were finished"
    assert re.search(r"shard \d+ could not be written: no space left; it needs \d+\.\d MB", ran.stderr), ran.stderr
    assert "Traceback" not in ran.stderr
    assert lines[3] == "exit 0"
    assert contents(tmp_path / "after.zarr", "zarr.json") == contents(float_store, "zarr.json")
    assert verify_store(open_store(tmp_path / "after.zarr")) == []
