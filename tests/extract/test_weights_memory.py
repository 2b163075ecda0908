"""A checkpoint goes into memory once: read tensor by tensor, never held whole beside the tower."""

import json
import subprocess
import sys

import pytest

# 8 blocks of width 1024, about 400 MB in float32; a text tower that nobody builds.
CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 8, "width": 1024, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1},
}

COMMON = """
import sys, threading, time
from pathlib import Path
import open_clip, torch
from s4v.extract.backbone import build_backbone
folder = Path(sys.argv[1])
open_clip.add_model_config(folder / "models")

def build(weights):
    return build_backbone("wide", weights=weights, device=torch.device("cpu"))
"""

SAVE = """
from safetensors.torch import save_file
state = {f"visual.{name}": value for name, value in build("random").load_weights().tower.state_dict().items()}
torch.save(state, folder / "wide.pt")
save_file(state, folder / "wide.safetensors")
"""

# Pages of the mapped file do not count: the kernel takes them back when it needs room.
LOAD = """
backbone = build(str(folder / sys.argv[2]))
peak, is_done = 0, False

def read_anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def watch():
    global peak
    while not is_done:
        peak = max(peak, read_anonymous())
        time.sleep(0.002)

before = read_anonymous()
thread = threading.Thread(target=watch)
thread.start()
backbone.load_weights()
is_done = True
thread.join()
weights = sum(parameter.nbytes for parameter in backbone.tower.parameters())
print(weights, max(peak, read_anonymous()) - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide")
    (path / "models").mkdir()
    (path / "models/wide.json").write_text(json.dumps(CONFIG))
    subprocess.run([sys.executable, "-c", COMMON + SAVE, path], check=True)
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("file", ["wide.safetensors", "wide.pt"])
def test_a_checkpoint_is_never_twice_in_memory(file, folder):
    command = [sys.executable, "-c", COMMON + LOAD, folder, file]
    weights, taken = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert 350e6 < weights < 450e6
    assert 0.9 * weights < taken <= 1.2 * weights
