import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s4v.errors import StoreMismatchError
from s4v.store.codecs.affine import AffineCodec, fit_scale
from s4v.train.networks import parts
from s4v.train.networks.norms import BatchNorm
from s4v.train.networks.parts import Tap, convolve_time, shift_class_token, sum_shifted
from s4v.train.networks.side4video import RetrievalSideNetwork, SideNetwork

LADDER = dict(num_layers=2, width=24, side_width=64, num_patches=9, patch_px=4)
SIZES = dict(**LADDER, num_classes=5)


@pytest.fixture(params=["clip", "eva"])
def network(request):
    torch.manual_seed(0)
    return SideNetwork(**SIZES, family=request.param)


def retrieval_network(family, **options):
    torch.manual_seed(0)
    end = dict(embed_dim=7, norm_eps=1e-5 if family == "clip" else 1e-6, has_projection_bias=family == "eva")
    return RetrievalSideNetwork(**LADDER, **end, family=family, **options)


def clips(batch=2, frames=4):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, frames, 3, 12, 12, generator=generator),
        torch.randn(batch, frames, 2, 9, 24, generator=generator),
        torch.randn(batch, frames, 2, 24, generator=generator),
    )


def test_every_parameter_gets_a_gradient(network):
    network(*clips()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", ["clip", "eva"])
@pytest.mark.parametrize("trains_end", [True, False])
def test_every_parameter_of_retrieval_gets_a_gradient_but_a_frozen_end(family, trains_end):
    network = retrieval_network(family, trains_end=trains_end)
    torch.nn.init.normal_(network.widen.weight)  # of zeros, nothing comes back to what is before it
    network(*clips()).square().sum().backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    end = {name for name, _ in network.named_parameters() if name.startswith("end.")}
    assert without == {"logit_scale"} | (set() if trains_end else end), "the loss alone knows the scale"


@pytest.mark.parametrize("family", ["clip", "eva"])
def test_a_silent_side_network_leaves_the_backbones_own_embedding(family):
    """Before training, retrieval is the frozen tower's end, as the store's head holds it."""
    network = retrieval_network(family).eval()
    generator = np.random.default_rng(0)
    shapes = {"norm_weight": 24, "norm_bias": 24, "proj_weight": (7, 24)} | (
        {"proj_bias": 7} if family == "eva" else {}
    )
    head = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    network.end.norm.eps = 0.25
    network.end.load_arrays({**head, "norm_eps": np.float32(0.25), "logit_scale": np.float32(1)})
    pixels, patches, cls = clips()
    last = cls[:, :, -1].numpy()
    centred = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 0.25)
    expected = (centred * head["norm_weight"] + head["norm_bias"]) @ head["proj_weight"].T + head.get("proj_bias", 0)
    found = network(pixels, patches, cls)
    assert found.shape == (2, 4, 7)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_end_of_another_tower_is_refused_with_both_sizes():
    head = {"norm_weight": np.ones(8), "norm_bias": np.ones(8), "proj_weight": np.ones((7, 8)), "norm_eps": 1e-5}
    with pytest.raises(StoreMismatchError, match=r"takes .*\(7, 24\).*holds .*\(7, 8\)"):
        retrieval_network("clip").end.load_arrays(head)


def test_the_end_of_a_tower_with_another_eps_is_refused():
    """A state dict holds no eps: taking it over would give a network whose saved weights mean something else."""
    head = {"norm_weight": np.ones(24), "norm_bias": np.ones(24), "proj_weight": np.ones((7, 24)), "norm_eps": 1e-6}
    with pytest.raises(StoreMismatchError, match="'eps': '1e-05'.*'eps': '1e-06'.*build the network with the"):
        retrieval_network("clip").end.load_arrays(head)


def test_codes_give_what_their_decoded_tokens_give(network):
    pixels, patches, cls = clips()
    scale = fit_scale(patches.abs().amax(dim=(0, 1, 3)).numpy(), patches.std(dim=(0, 1, 3)).numpy())
    from_store = AffineCodec(dtype="int8", scale=scale)
    codec = from_store.map_parts(torch.from_numpy)
    codes = torch.stack([codec.encode(patches[:, :, layer], layer) for layer in range(2)], dim=2)
    decoded = torch.stack([codec.decode(codes[:, :, layer], layer) for layer in range(2)], dim=2)
    network.eval()
    assert torch.equal(network(pixels, codes, cls, codec=codec), network(pixels, decoded, cls))
    assert torch.equal(network(pixels, codes, cls, codec=from_store), network(pixels, decoded, cls)), "numpy arrays too"


def test_any_number_of_frames_is_taken(network):
    network.eval()
    assert network(*clips(frames=1)).shape == (2, 5)
    assert network(*clips(frames=7)).shape == (2, 5)


def test_order_of_frames_matters_and_order_of_clips_does_not(network):
    network.eval()
    pixels, patches, cls = clips()
    forward = network(pixels, patches, cls)
    backward = network(pixels.flip(1), patches.flip(1), cls.flip(1))
    assert not torch.allclose(forward, backward, atol=1e-4)
    swapped = network(pixels.flip(0), patches.flip(0), cls.flip(0))
    torch.testing.assert_close(swapped, forward.flip(0))


def test_wrong_number_of_layers_is_refused_with_both_values(network):
    pixels, patches, cls = clips()
    with pytest.raises(StoreMismatchError, match="takes 2 layers of 9 patches; found 1 layers of 9"):
        network(pixels, patches[:, :, :1], cls[:, :, :1])


def test_class_token_halves_come_from_the_next_and_the_last_frame():
    cls = torch.arange(3.0)[None, :, None].expand(1, 3, 4) + 1
    assert shift_class_token(cls)[0].tolist() == [[2, 2, 0, 0], [3, 3, 1, 1], [0, 0, 2, 2]]


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("num_steps", [3, 5])
def test_shifted_sum_is_a_convolution_over_time(num_steps, num_frames):
    """Also of clips that are shorter than the kernel."""
    x = torch.randn(2, num_frames, 3, 4, dtype=torch.double, requires_grad=True)
    kernel = torch.randn(4, 1, num_steps, dtype=torch.double)
    rows = x.permute(0, 2, 3, 1).reshape(6, 4, num_frames)
    expected = torch.nn.functional.conv1d(rows, kernel, padding=num_steps // 2, groups=4)
    expected = expected.view(2, 3, 4, num_frames).permute(0, 3, 1, 2)
    found = sum_shifted(*(x * kernel[:, 0, step] for step in range(num_steps)))
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad(one, x, weight)[0] for one in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_sizes_of_the_paper():
    """Tunable parameters that the paper states, in millions; with its K400 head of 400 classes."""
    for family, sizes, stated in (
        ("clip", dict(num_layers=12, width=768, side_width=320, num_patches=196, patch_px=16), 21),
        ("clip", dict(num_layers=6, width=768, side_width=192, num_patches=196, patch_px=16), 4.5),
        ("clip", dict(num_layers=24, width=1024, side_width=512, num_patches=256, patch_px=14), 102),
        ("clip", dict(num_layers=12, width=1024, side_width=320, num_patches=256, patch_px=14), 22),
        ("eva", dict(num_layers=32, width=1792, side_width=576, num_patches=256, patch_px=14), 183),
    ):
        with torch.device("meta"):
            network = SideNetwork(**sizes, num_classes=400, family=family)
        count = sum(p.numel() for p in network.parameters()) / 1e6
        assert count == pytest.approx(stated, rel=0.06), (sizes, count)


@pytest.mark.parametrize("family", ["clip", "eva"])
@pytest.mark.parametrize(("inputs", "left_out"), [("pixels", {"patches", "cls"}), ("tokens", {"pixels"})])
def test_ablations_are_the_whole_network_without_its_other_input(inputs, left_out, family):
    torch.manual_seed(0)
    ablated = SideNetwork(**SIZES, inputs=inputs, family=family).eval()
    whole = SideNetwork(**SIZES, family=family).eval()
    state = ablated.state_dict()
    whole.load_state_dict(state, strict=False)
    arrays = dict(zip(("pixels", "patches", "cls"), clips(), strict=True))
    assert set(ablated.arrays) == set(arrays) - left_out
    seen = ablated(*(None if name in left_out else value for name, value in arrays.items()))
    assert torch.equal(ablated(*arrays.values()), seen), "what is left out is not looked at"
    if inputs == "pixels":
        expected = whole(arrays["pixels"], *(torch.zeros_like(arrays[name]) for name in ("patches", "cls")))
    else:
        # The whole network's stem silenced: whatever it sees, it says zero.
        for parameter in whole.stem.parameters():
            parameter.data.zero_()
        expected = whole(*arrays.values())
    torch.testing.assert_close(seen, expected)


def test_a_network_without_a_stem_gives_every_parameter_a_gradient():
    network = SideNetwork(**SIZES, inputs="tokens")
    _, patches, cls = clips()
    network(None, patches, cls).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def projecting_codec(num_layers=2, width=24, channels=16, massive=300.0):
    """A basis and a mean as calibration leaves them, and one channel as enormous as giant ViTs have."""
    generator = np.random.default_rng(3)
    basis = np.stack([np.linalg.qr(generator.normal(size=(width, channels)))[0].T for _ in range(num_layers)])
    mean = generator.normal(size=(num_layers, width))
    mean[:, 5] = massive
    scale = generator.uniform(0.01, 0.03, size=(num_layers, channels))
    parts = {"mean": mean, "basis": basis, "scale": scale}
    return AffineCodec(
        dtype="int8", **{name: torch.from_numpy(part.astype(np.float32)) for name, part in parts.items()}
    )


@pytest.mark.parametrize("massive", [0.0, 300.0])
@pytest.mark.parametrize("is_post_norm", [False, True])
def test_codes_are_read_as_their_decoded_tokens_are(is_post_norm, massive):
    """Without ever making the tokens: outputs and gradients of every parameter agree."""
    torch.manual_seed(0)
    tap, codec = Tap(24, 64, is_post_norm), projecting_codec(massive=massive)
    for parameter in tap.parameters():
        torch.nn.init.normal_(parameter)
    codes = torch.randint(-127, 128, (2, 3, 9, 16), dtype=torch.int8)
    results = []
    for read in (lambda: tap.read_codes(codes, codec, 1), lambda: tap(codec.decode(codes, 1))):
        tap.zero_grad()
        out = read()
        (out * torch.linspace(-1, 1, 64)).sum().backward()
        results.append([out.detach(), *(parameter.grad.clone() for parameter in tap.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_a_network_reads_codes_as_it_reads_tokens(network):
    pixels, patches, cls = clips()
    codec = projecting_codec()
    codes = torch.stack([codec.encode(patches[:, :, layer], layer) for layer in range(2)], dim=2)
    decoded = torch.stack([codec.decode(codes[:, :, layer], layer) for layer in range(2)], dim=2)
    network.eval()
    torch.testing.assert_close(network(pixels, codes, cls, codec=codec), network(pixels, decoded, cls))


def test_layers_that_are_computed_again_change_nothing_but_memory(network):
    networks = [network, copy.deepcopy(network)]
    networks[1].checkpoints_activations = True
    for one in networks:
        one.train()
        one(*clips()).square().sum().backward()
    for (name, ours), theirs in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(networks[0].named_buffers(), networks[1].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("again", [False, True])
def test_what_is_made_again_is_what_would_have_been_kept(network, again, monkeypatch):
    """From S = 192 on blocks keep little; here narrow ones do too. Alone, and inside layers that are computed again."""
    codec = AffineCodec(
        dtype="int8",
        basis=np.linalg.qr(np.random.default_rng(0).normal(size=(2, 24, 6)))[0].transpose(0, 2, 1).astype(np.float32),
        scale=np.full((2, 6), 0.05, np.float32),
    ).map_parts(torch.from_numpy)
    pixels, _, cls = clips()
    codes = torch.randint(-127, 128, (2, 4, 2, 9, 6), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    networks, kept = [network, copy.deepcopy(network)], []
    for one, least_width in zip(networks, (10**6, 0), strict=True):
        monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", least_width)
        one.checkpoints_activations = again and least_width == 0
        stored = {}

        def keep(tensor, stored=stored):
            stored[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = one(pixels, codes, cls, codec).square().sum()
        kept.append(sum(size for size, _ in stored.values()))
        loss.backward()
    for (name, ours), theirs in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(networks[0].named_buffers(), networks[1].buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_of_codes_as_wide_as_tokens_only_the_codes_are_kept(network, dtype, monkeypatch):
    """Stores without a basis: no full-width float of a layer waits for the backward pass, and no bit is another."""
    scale = np.full((2, 24), 0.02, np.float32) if dtype == "int8" else None
    codec = AffineCodec(dtype=dtype, scale=scale).map_parts(torch.from_numpy)
    pixels, patches, cls = clips()
    codes = torch.stack([codec.encode(patches[:, :, layer], layer) for layer in range(2)], dim=2)
    networks, wide = [network, copy.deepcopy(network)], []
    for one, least_width in zip(networks, (10**6, 0), strict=True):
        monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", least_width)
        stored = {}

        def keep(tensor, stored=stored):
            # Full-width tokens of a layer, as they are decoded or normalised: B * T * N * D.
            if tensor.is_floating_point() and tensor.numel() == 2 * 4 * 9 * 24:
                stored[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = one(pixels, codes, cls, codec).square().sum()
        stored.pop(codes.untyped_storage().data_ptr(), None)  # codes themselves may be floats
        wide.append(len(stored))
        loss.backward()
    assert wide[0] >= 2 and wide[1] == 0
    for (name, ours), theirs in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_batch_norm_of_vectors_is_torchs():
    torch.manual_seed(0)
    ours, theirs = BatchNorm(5, affine=False), torch.nn.BatchNorm1d(5, affine=False)
    x = torch.randn(7, 5)
    assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_a_kernel_over_time_has_the_gradients_of_a_convolution(num_frames):
    """Against torch's own depthwise convolution, and numerically."""
    rng = torch.Generator().manual_seed(0)
    sizes = ((2, num_frames, 3, 4), (3, 4), (4,))
    x, weight, bias = (torch.randn(size, generator=rng, dtype=torch.float64, requires_grad=True) for size in sizes)
    assert torch.autograd.gradcheck(convolve_time, (x, weight, bias))
    channels_first = x.permute(0, 2, 3, 1).flatten(0, 1)  # (B*N, S, T)
    theirs = F.conv1d(channels_first, weight.T[:, None], bias, padding=1, groups=4)
    expected = theirs.unflatten(0, (2, 3)).permute(0, 3, 1, 2)
    ours = convolve_time(x, weight, bias)
    torch.testing.assert_close(ours, expected)
    cotangent = torch.randn(ours.shape, generator=rng, dtype=torch.float64)
    gradients = [torch.autograd.grad((y * cotangent).sum(), (x, weight, bias)) for y in (ours, expected)]
    torch.testing.assert_close(*gradients)


def test_a_kernel_over_time_keeps_the_precision_of_its_tokens_and_its_weights():
    x = torch.randn(2, 4, 3, 8).bfloat16().requires_grad_()
    weight, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = convolve_time(x, weight, bias)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (weight.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    assert bias.grad.tolist() == [24.0] * 8
