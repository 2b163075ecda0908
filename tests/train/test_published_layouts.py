"""What benchmarks/side_network.py times ours against: published layouts that compute the same."""

import importlib.util
from pathlib import Path

import pytest
import torch

from s4v.train.networks import parts
from s4v.train.networks.dist import DistNetwork
from s4v.train.networks.side4video import SideNetwork
from s4v.train.networks.tds_clip import TdsNetwork

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CLIPS, FRAMES = 3, 4
SIZES = {"num_layers": 2, "width": 48, "side_width": 128, "num_patches": 16, "patch_px": 8, "num_classes": 5}
DIST_SIZES = {"temporal_width": 24, "num_frames": FRAMES, "pooling_layers": 2, "embed_dim": 32}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


published = load_script("_published")

NETWORKS = {
    "side4video": (SideNetwork, published.SideNetwork, {}, {}, (FRAMES,)),
    "tds-clip": (TdsNetwork, published.SideNetwork, {}, {"is_tds_clip": True}, (FRAMES, 5)),
    "dist": (DistNetwork, published.DistNetwork, DIST_SIZES, {}, (2 * FRAMES,)),
}


@pytest.fixture(params=NETWORKS)
def networks(request, monkeypatch):
    """Ours and the published one with its weights, in double precision, and inputs."""
    monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", 0)
    build_ours, build_theirs, more, only_theirs, frames = NETWORKS[request.param]
    torch.manual_seed(0)
    ours = build_ours(**SIZES, **more).double()
    for tensor in (*ours.parameters(), *ours.buffers()):
        if tensor.is_floating_point():  # no weight, bias or statistic may be where it says nothing
            tensor.data.add_(0.1 * torch.rand_like(tensor))
    theirs = published.take_weights(build_theirs(**SIZES, **more, **only_theirs).double(), ours)
    pixels = torch.randn(CLIPS, *frames, 3, 32, 32).double()
    patches, cls = torch.randn(CLIPS, FRAMES, 2, 16, 48).double(), torch.randn(CLIPS, FRAMES, 2, 48).double()
    return ours, theirs, (pixels, patches, cls)


def take_steps(networks):
    ours, theirs, (pixels, patches, cls) = networks
    expected, found = ours(pixels, patches, cls), theirs(pixels, published.order_tokens(patches, cls))
    for output in (expected, found):
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
    return expected, found


def test_published_layouts_have_our_logits_gradients_and_statistics(networks):
    ours, theirs, _ = networks
    expected, found = take_steps(networks)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert published.compare(theirs, ours) < 1e-10
    for name, buffer in published.rename(dict(ours.named_buffers()), theirs).items():
        torch.testing.assert_close(theirs.get_buffer(name), buffer, rtol=1e-10, atol=1e-10)


def test_published_layouts_have_our_logits_in_evaluation(networks):
    ours, theirs, (pixels, patches, cls) = networks
    with torch.inference_mode():
        expected = ours.eval()(pixels, patches, cls)
        found = theirs.eval()(pixels, published.order_tokens(patches, cls))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_gradient_that_differs_is_found(networks):
    ours, theirs, _ = networks
    take_steps(networks)
    theirs.blocks[1].get_parameter(next(name for name, _ in theirs.blocks[1].named_parameters())).grad[0] *= 1.01
    assert published.compare(theirs, ours) > 1e-4


def test_what_a_step_does_is_told_by_kind():
    profiles = load_script("_profile")
    layer, convolution = torch.nn.Linear(64, 64), torch.nn.Conv3d(4, 4, (3, 1, 1))

    def step():
        layer(torch.ones(64, 64)).sum().backward()
        convolution(torch.ones(1, 4, 5, 8, 8)).sigmoid().sum().backward()

    found = profiles.profile_step(step, torch.device("cpu"), 2)
    kinds = ("products", "convolutions", "activations", "sums, additions, multiplications", profiles.REST)
    assert all(found.get(kind, 0) > 0 for kind in kinds)
    assert "batch norms" not in found and "our kernel over time" not in found


@pytest.mark.parametrize(
    ("operation", "is_product"),
    [
        ("aten::addmm", True),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", True),
        ("convolution_backward", True),
        ("mkldnn_convolution", True),
        ("native_batch_norm", False),
        ("mul", False),
    ],
)
def test_products_are_known_by_name(operation, is_product):
    assert load_script("_profile").is_product(operation) is is_product
