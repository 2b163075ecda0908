"""The examples of docs/extending.md do what the page says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from s4v.backbone.facts import BackboneInfo
from s4v.extract import codec_fit
from s4v.extract.datasets import READERS
from s4v.extract.decode.views import NUM_VIEWS, VIEWS, centre_view
from s4v.extract.extraction import extract_dataset
from s4v.store.codecs import CODECS
from s4v.store.reader import open_store
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.networks import NETWORKS
from s4v.train.run_folder import open_run
from s4v.train.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs/extending.md"
TABLES = (READERS, NETWORKS, TASKS, CODECS, VIEWS, NUM_VIEWS)


@pytest.fixture
def example(monkeypatch):
    """Run the code of a section; lines in tables are taken out again."""
    before = [dict(table) for table in TABLES]

    def run(section):
        text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
        (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        module = types.ModuleType("example")
        monkeypatch.setitem(sys.modules, "example", module)  # dataclasses look their own module up
        exec(compile(code, str(PAGE), "exec"), vars(module))
        return vars(module)

    yield run
    for table, lines in zip(TABLES, before, strict=True):
        table.clear()
        table.update(lines)


def test_a_data_set(example, make_video, make_config, tmp_path):
    example("A data set")
    root = tmp_path / "gestures"
    for seed, name in enumerate("ab"):
        make_video(root / f"{name}.mp4", num_frames=8, seed=seed)
    (root / "gestures.txt").write_text("a train wave\nb val point\n")
    config = make_config(root, tmp_path / "s.zarr", dataset="gestures", num_decoders=1)
    assert extract_dataset(config).videos["ok"] == 2
    assert open_store(config.out).classes.names == ("point", "wave")


def test_a_network(example, int8_store, tmp_path):
    example("A network")
    options = dict(features=int8_store, head="middle", batch_size=4, epochs=1, device="cpu", set=("hidden=32",))
    train_run(TrainConfig(out=tmp_path / "run", **options))
    assert open_run(tmp_path / "run").shape.hidden == 32
    assert evaluate_run(tmp_path / "run")["videos"] == 2


def test_a_task(example, int8_store, tmp_path):
    example("A task")
    network = example("A network")

    class Reader(network["MiddleProbe"]):
        arrays = ("patches", "cls")

        def forward(self, pixels, patches, cls, codec=None):
            return super().forward(pixels, patches, cls, codec)[:, 0]

    class Kind(network["Middle"]):
        name = "mover"
        tasks = ("movement",)

        def build(self, shape):
            return Reader(type(shape)(**{**vars(shape), "num_classes": 1}))

    NETWORKS["mover"] = Kind()
    config = TrainConfig(
        features=int8_store, out=tmp_path / "run", task="movement", head="mover", batch_size=4, device="cpu"
    )
    assert train_run(config)["epochs"] == 2
    figures = evaluate_run(tmp_path / "run")
    assert TASKS["movement"].render(tmp_path, figures) == [f"{tmp_path}: fit {figures['fit']:.1%}"]


def test_a_library_of_backbones(example):
    names = example("A library of backbones")
    torch.manual_seed(0)
    tower = names["PlainTower"](32, 3, 8)
    info = BackboneInfo(
        name="plain",
        architecture="plain",
        weights="random:0",
        weights_sha256="0" * 64,
        width=32,
        depth=3,
        grid=(4, 4),
        patch_size=(8, 8),
        image_size=(32, 32),
        embed_dim=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        precision="fp32",
        device_type="cpu",
        side_family="clip",
    )
    backbone = names["PlainBackbone"](tower.eval(), info, torch.device("cpu"), tower)
    frames = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    tokens = backbone.encode_frames(frames, (1, 2))
    assert [one.shape for one in tokens.patches] == [(2, 16, 32)] * 2 and tokens.cls.shape == (2, 2, 32)
    head = backbone.read_head()
    expected = torch.nn.functional.layer_norm(
        tokens.cls[:, -1], (32,), *(torch.from_numpy(head[f"norm_{part}"]) for part in ("weight", "bias"))
    )
    torch.testing.assert_close(tokens.embedding, expected)


def test_a_codec(example, video_folder, make_config, tmp_path, monkeypatch):
    codec = example("A codec")["HalvesCodec"]
    monkeypatch.setitem(codec_fit.FITS, "halves", lambda dtype, *_, **__: codec(dtype=dtype))
    config = make_config(
        video_folder, tmp_path / "s.zarr", codec="halves", dtype="int8", channels=192, num_decoders=1, limit=2
    )
    extract_dataset(config)
    clip = open_store(config.out).read_clips([0], [[0]])
    assert open_store(config.out).codec.name == "halves" and clip.patches.any()
    tokens = np.linspace(-3, 3, 25, dtype=np.float32)[None]
    assert np.abs(codec(dtype="int8").decode(codec(dtype="int8").encode(tokens, 0), 0) - tokens).max() <= 0.25


def test_a_view(example, video_folder, make_config, tmp_path):
    example("A view")
    top, bottom = VIEWS["ends"](320, 240, "256", (224, 224))
    assert top.y == 0 and bottom.y == top.resized_height - 224 and top.x == centre_view(320, 240, "256", (224, 224)).x
    config = make_config(video_folder, tmp_path / "s.zarr", views={"": "ends"}, num_decoders=1, limit=1)
    extract_dataset(config)
    assert open_store(config.out).layout.num_views == 2
