import subprocess
import sys

import pytest
from typer.testing import CliRunner

from s4v.cli import app

# Allocates and frees what glibc would give back at once, again and again, and counts the pages that the kernel cleared.
COUNT = """
import resource, torch
from s4v.train.allocator import keep_freed_memory
kept = keep_freed_memory()
for _ in range(20):
    torch.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**22)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**environment: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux")
@pytest.mark.slow  # measures memory
def test_freed_memory_is_taken_again():
    kept, faults = run()
    if kept == "False":
        pytest.skip("no glibc here")
    assert faults < 1000, "16 MB are 4,096 pages, ten times"
    assert run(MALLOC_TRIM_THRESHOLD_="131072")[0] == "False", "what the user has set stays"


def test_the_demo_takes_its_memory_again_too(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr("s4v.train.allocator.keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr("s4v.demo.pipeline.run_demo", lambda *_, **__: {"methods": {}, "chance": 0.5, "report": "r"})
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")], catch_exceptions=False)
    assert result.exit_code == 0 and kept == [True]
