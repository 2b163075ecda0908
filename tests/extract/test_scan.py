import json

import pyarrow.parquet
from typer.testing import CliRunner

from s4v.cli import app


def test_a_scan_names_what_an_extraction_would_lose(video_folder, tmp_path):
    out = tmp_path / "new" / "scan.parquet"
    command = ["scan", "--dataset", "folder", "--root", str(video_folder), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--json", "--strict"])
    assert result.exit_code == 3, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["videos"] == {"ok": 10, "failed": 1, "pending": 0} and told["reasons"] == {"unreadable": 1}
    rows = pyarrow.parquet.read_table(out).to_pylist()
    assert [row["video_id"] for row in rows] == sorted(row["video_id"] for row in rows)
    good = next(row for row in rows if row["video_id"] == "train/walk/0.mp4")
    assert (good["status"], good["num_frames"], good["width"], good["height"]) == ("ok", 20, 80, 64)
    assert good["bytes"] == (video_folder / "train/walk/0.mp4").stat().st_size
    (bad,) = (row for row in rows if row["status"] == "failed")
    assert bad["video_id"] == "train/walk/broken.mp4" and bad["num_frames"] is None
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "10 videos decode, 1 do not" in result.stdout
    assert "train/walk/broken.mp4: unreadable" in result.stdout
