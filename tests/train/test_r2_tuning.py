"""R2-Tuning against the reference's own modules (golden files of yeliudev/R2-Tuning at 03fbcf6), and as a network."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from s4v.errors import ConfigError, StoreMismatchError, WeightsError
from s4v.extract.extraction import extract_dataset
from s4v.store.codecs.affine import AffineCodec
from s4v.store.reader import open_store
from s4v.train.clips import ClipBatch, ClipLoader, codec_for, find_captioned_rows, plan_whole_rows
from s4v.train.config import TrainConfig
from s4v.train.networks import parts, r2_tuning
from s4v.train.networks.contract import Outputs
from s4v.train.networks.draws import key_examples
from s4v.train.networks.r2_tuning import R2Network, R2Options, R2Shape, R2Tuning, embed_positions, list_points
from s4v.train.networks.text_interaction import TextBatch
from s4v.train.paper.r2_tuning_names import UNUSED, read_sizes, rename, rename_state
from s4v.train.paper.r2_tuning_presets import R2_TUNING_PRESETS, share_of_rate
from s4v.train.recipe import Optimisation, find_biases, make_optimizer
from s4v.train.scorer import Scorer
from s4v.train.tasks.grounding_losses import Annotation, GroundingWeights, find_losses, find_terms

SETS = ("moments", "highlights")
NO_GRADIENT = ("recurrence.pooling.key.bias", "attention.key.bias")
"""Zero in exact arithmetic: a number that all answers share changes no softmax."""


class Golden(NamedTuple):
    name: str
    config: dict
    io: dict
    grads: dict
    state: dict

    @property
    def inputs(self):
        """Patches, class tokens, words and their masks, as a store has them."""
        io = self.io
        words = io["query"].transpose(1, 2)
        video_mask, query_mask = io["video_mask"].bool(), io["query_mask"].bool()
        return io["video"][:, :, :, 1:], io["video"][:, :, :, 0], words, query_mask, video_mask

    @property
    def annotation(self):
        io = self.io
        windows = io["windows"] * io["fps"][:, None, None] if "windows" in io else None
        return Annotation(io["saliency"], io["positive"], windows)

    @property
    def weights(self):
        told = self.config["loss_weights"]
        columns = "col" in self.config["saliency_directions"]
        weights = GroundingWeights(has_columns=columns)
        assert {name: getattr(weights, name) for name in told} == told
        return weights

    def of_video(self, place):
        """Inputs of one video alone, not padded."""
        patches, cls, words, _, _ = self.inputs
        num_frames, num_words = self.config["frames"][place], self.config["words"][place]
        own = slice(place, place + 1)
        return patches[own, :num_frames], cls[own, :num_frames], words[own, :, :num_words]


def read_golden(folder):
    config = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state_dict"]
    grads = load_file(folder / "grads.safetensors")
    return Golden(folder.name, config, load_file(folder / "io.safetensors"), rename_state(grads), rename_state(state))


@pytest.fixture(scope="module", params=SETS)
def golden(request, data_path):
    return read_golden(data_path / "r2_tuning" / request.param)


@pytest.fixture(scope="module")
def moments(data_path):
    return read_golden(data_path / "r2_tuning/moments")


def build(config, **changes):
    highlights = "highlights" in config["variant"]
    shape = R2Shape(
        name=R2Tuning.name,
        num_classes=0,
        layers=tuple(range(config["layers"])),
        width=config["backbone_width"],
        num_patches=config["patches"],
        patch_px=32,
        task="grounding",
        text_width=config["text_width"],
        side_width=config["dims"],
        heads=config["heads"],
        dropout=config["dropout"],
        drop_path=config["drop_path"],
        strides=tuple(config["strides"]),
        has_boundaries=not highlights,
        has_times=config["time_features"],
    )
    return R2Tuning().build(replace(shape, **changes))


def load(golden, **changes):
    network = build(golden.config, **changes)
    network.load_state_dict(golden.state)
    return network


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def watch(network):
    """What the recurrence comes to, as it is when the network is run."""
    seen = []
    network.recurrence.register_forward_hook(lambda _, __, output: seen.append(output))
    return seen


def sum_losses(golden, output):
    return find_losses(find_terms(output, golden.annotation, golden.inputs[4]), golden.weights)


def test_every_step_of_training_equals_the_reference(golden):
    network = load(golden).train()
    seen = watch(network)
    output = network(*golden.inputs)
    (refined,) = seen
    terms = find_terms(output, golden.annotation, golden.inputs[4])
    losses = find_losses(terms, golden.weights)
    found = {
        "refined": refined.frames,
        "words": refined.words,
        "video": output.frames,
        "query": output.query,
        "layer_cls": output.layer_cls,
        "layer_query": output.layer_query,
        "points": output.points,
        "level_mask": output.level_mask,
        "class_logits": output.logits,
        "loss": sum(losses.values()),
        **{f"loss_{name}": loss for name, loss in losses.items()},
    }
    if golden.name == "moments":
        found |= {"offsets": output.offsets, "class_target": terms.target, "offset_target": terms.reach_target}
    assert {f"train_{name}" for name in found} == {name for name in golden.io if name.startswith("train_")}
    for name, values in found.items():
        expected = golden.io[f"train_{name}"]
        if name == "offset_target":
            expected = expected.where(golden.io["train_class_target"][..., None] > 0, 0.0)
        if name in ("points", "level_mask", "class_target"):
            assert torch.equal(values.to(expected.dtype), expected), name
        else:
            assert relative(values, expected) < 1e-5, name


@pytest.mark.parametrize("again", ["kept", "made again", "layers again"])
def test_gradients_equal_the_reference(golden, again, monkeypatch):
    """Each relative to its layer's largest; those that are zero in exact arithmetic relative to the largest of all."""
    monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", 10**6 if again == "kept" else 0)
    network = load(golden).train()
    network.checkpoints_activations = again == "layers again"
    sum(sum_losses(golden, network(*golden.inputs)).values()).backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert found.keys() == golden.grads.keys()
    scale = {}
    for name, tensor in golden.grads.items():
        layer = name.rpartition(".")[0]
        scale[layer] = max(scale.get(layer, 0.0), tensor.abs().max().item())
    largest = max(scale.values())
    for name, tensor in golden.grads.items():
        error = (found[name] - tensor).abs().max().item()
        assert error / (largest if name.endswith(NO_GRADIENT) else scale[name.rpartition(".")[0]]) < 1e-5, name


def show_moments(output, fps):
    """All points of one video in seconds with their scores, the best first."""
    place, stride = output.points[:, 0], output.points[:, 3]
    start, end = place - output.offsets[0, :, 0] * stride, place + output.offsets[0, :, 1] * stride
    moments = torch.stack([start / fps, end / fps, output.logits[0].sigmoid()], dim=1)
    return moments[moments[:, 2].argsort(descending=True)][:50]


def show_saliency(output, merges):
    """Of each frame the best score of any level, times the cosine with the query where there are moments."""
    num_frames, levels = output.frames.shape[1], []
    for stride in output.points[:, 3].unique():
        scores = output.logits[0, output.points[:, 3] == stride].sigmoid()
        repeated = scores.repeat_interleave(num_frames // len(scores))
        levels.append(torch.cat([repeated, repeated[-1:].expand(num_frames - len(repeated))]))
    best = torch.stack(levels).amax(dim=0)
    return best * torch.cosine_similarity(output.frames[0], output.query, dim=-1) if merges else best


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_video_alone_is_said_what_the_reference_says(golden, place):
    """Not padded: time features, positions, levels and borders follow from its own length."""
    network = load(golden).eval()
    with torch.inference_mode():
        output = network(*golden.of_video(place))
    merges = golden.config["merge_class_and_saliency"]
    assert relative(show_saliency(output, merges), golden.io[f"eval{place}_saliency"]) < 1e-5
    if merges:
        moments = show_moments(output, golden.io["fps"][place])
        expected = golden.io[f"eval{place}_moments"]
        assert moments.shape == expected.shape and relative(moments, expected) < 1e-5


def test_dropout_and_drop_path_sit_where_the_references_do(moments, data_path, monkeypatch):
    """With both replaced by factors that need no random number."""
    told = json.loads((data_path / "r2_tuning/moments/dropout_rule.json").read_text())["losses"]

    def drop_channels(x, keys, place, tokens, probability):
        return x * (1 + 0.5 * torch.cos(1.7 * torch.arange(x.shape[-1])))

    def drop_examples(x, keys, place, probability):
        return x * (1 + 0.3 * torch.arange(len(x))).view(-1, 1, 1)

    monkeypatch.setattr(r2_tuning, "drop_channels", drop_channels)
    monkeypatch.setattr(r2_tuning, "drop_examples", drop_examples)
    network = load(moments, dropout=0.5, drop_path=0.1).train()
    losses = sum_losses(moments, network(*moments.inputs, draws=torch.arange(3)))
    assert losses.keys() == told.keys()
    for name, expected in told.items():
        assert losses[name].item() == pytest.approx(expected, rel=1e-5), name


def test_every_place_draws_otherwise(moments, monkeypatch):
    """Both products of both projections, the three branches, and every layer."""
    places, real = [], (r2_tuning.drop_channels, r2_tuning.drop_examples)
    for name, function in zip(("drop_channels", "drop_examples"), real, strict=True):
        note = lambda x, keys, place, *rest, function=function: (  # noqa: E731
            places.append((place, x.ndim)), function(x, keys, place, *rest))[1]  # fmt: skip
        monkeypatch.setattr(r2_tuning, name, note)
    load(moments, dropout=0.5, drop_path=0.1).train()(*moments.inputs, draws=torch.arange(3))
    # Class tokens and patches are the same place: their numbers of tokens differ.
    assert len({place for place, _ in places}) == 4 * 7 and len(places) == 4 * (6 + 3)


def affine_codec(golden, dtype="int8", channels=24):
    rng, width = np.random.default_rng(0), golden.config["backbone_width"]
    basis = np.stack([np.linalg.qr(rng.normal(size=(width, channels)))[0].T for _ in range(4)]).astype(np.float32)
    mean = rng.normal(size=(4, width)).astype(np.float32)
    scale = np.full((4, channels), 0.03, np.float32) if dtype == "int8" else None
    return AffineCodec(dtype=dtype, basis=basis, mean=mean, scale=scale).map_parts(torch.from_numpy)


def encode(golden, codec):
    """Codes (B, T, K, N, channels) and the tokens that they stand for, both zero where there is no frame."""
    patches, mask = golden.inputs[0], golden.inputs[4][:, :, None, None, None]
    codes = torch.stack([codec.encode(patches[:, :, layer], layer) for layer in range(4)], dim=2) * mask
    return codes, torch.stack([codec.decode(codes[:, :, layer], layer) for layer in range(4)], dim=2) * mask


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_codes_are_read_as_their_tokens_are(golden, dtype):
    """Folded into the first norm and product: outputs and gradients, of frames that are not there too."""
    codec = affine_codec(golden, dtype)
    codes, tokens = encode(golden, codec)
    _, *rest = golden.inputs
    networks = [load(golden).train() for _ in range(2)]
    outputs = [networks[0](codes, *rest, codec=codec), networks[1](tokens, *rest)]
    for name, ours, theirs in zip(outputs[0]._fields, *outputs, strict=True):
        if ours is not None and name not in ("points", "level_mask"):
            assert relative(ours, theirs) < 2e-6, name
    for output in outputs:
        sum(sum_losses(golden, output).values()).backward()
    largest = max(p.grad.abs().max().item() for p in networks[1].parameters() if p.grad is not None)
    for (name, ours), theirs in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        if ours.requires_grad:
            scale = largest if name.endswith(NO_GRADIENT) else theirs.grad.abs().max().item()
            assert (ours.grad - theirs.grad).abs().max().item() / scale < 2e-5, name


def test_an_evaluation_decodes_no_codes(golden, monkeypatch):
    codec = affine_codec(golden)
    codes, _ = encode(golden, codec)
    monkeypatch.setattr(AffineCodec, "decode", lambda *_: pytest.fail("codes were decoded"))
    _, cls, words = golden.of_video(0)
    with torch.inference_mode():
        load(golden).eval()(codes[:1, : cls.shape[1]], cls, words, codec=codec)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_is_made_again_is_what_would_have_been_kept(golden, dropout, monkeypatch):
    """To the bit, with what is dropped too; and layers that are computed again keep less still."""
    codec = affine_codec(golden)
    codes, _ = encode(golden, codec)
    _, *rest = golden.inputs
    grads, kept = [], []
    for least_width, again in ((10**6, False), (0, False), (0, True)):
        monkeypatch.setattr(parts, "_LEAN_FROM_WIDTH", least_width)
        network = load(golden, dropout=dropout, drop_path=dropout / 5).train()
        network.checkpoints_activations = again
        loss, size = measure_kept(
            lambda network=network: sum(
                sum_losses(golden, network(codes, *rest, torch.tensor([5, 7, 11]), codec)).values()
            ),
            network,
        )
        loss.backward()
        kept.append(size)
        grads.append([parameter.grad for parameter in network.parameters()])
    for other in grads[1:]:
        for ours, theirs in zip(grads[0], other, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
    assert kept[2] < kept[1] < kept[0]


def measure_kept(compute, network):
    """What `compute` gives, and bytes that it keeps for the backward pass beside the network's own weights."""
    own, stored = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}, {}

    def keep(tensor):
        stored[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    return result, sum(size for place, (size, _) in stored.items() if place not in own)


def test_a_video_keeps_137_mb_at_most_for_the_backward_pass():
    """75 frames, 13 words, beside B/32 in float32, codes among what is kept; the reference keeps 229 MB."""
    network = R2Network(num_layers=4, width=768, text_width=512, num_patches=49).train()
    rng = np.random.default_rng(0)
    basis = np.stack([np.linalg.qr(rng.normal(size=(768, 256)))[0].T for _ in range(4)]).astype(np.float32)
    scale = np.full((4, 256), 0.03, np.float32)
    codec = AffineCodec(dtype="int8", basis=basis, scale=scale).map_parts(torch.from_numpy)
    codes = torch.randint(-127, 128, (1, 75, 4, 49, 256), dtype=torch.int8)
    inputs = codes, torch.randn(1, 75, 4, 768), torch.randn(1, 4, 13, 512), None, None, torch.tensor([3]), codec
    kept = []
    for again in (False, True):
        network.checkpoints_activations = again
        _, size = measure_kept(lambda: network(*inputs).logits.sum(), network)
        kept.append(size / 1e6)
    assert kept[0] < 137 and kept[1] < kept[0] / 3, kept


def test_one_video_answers_many_queries_as_it_answers_each(golden):
    """What no query has a part in is computed once."""
    codec = affine_codec(golden)
    codes, _ = encode(golden, codec)
    num_frames = golden.config["frames"][0]
    _, cls, words, _, _ = golden.inputs
    inputs = codes[:1, :num_frames], cls[:1, :num_frames]
    network = load(golden).eval()
    with torch.inference_mode():
        together = network.answer(network.read_video(*inputs, codec), words)
        for place in range(len(words)):
            alone = network(*inputs, words[place : place + 1], codec=codec)
            for name, ours, theirs in zip(alone._fields, together, alone, strict=True):
                if ours is not None:
                    axis = {"layer_cls": 1, "layer_query": 1}.get(name, 0)
                    own = ours if name == "points" else ours.narrow(axis, place, 1)
                    torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-6, msg=name)


def test_what_is_dropped_follows_from_the_example_alone(moments):
    """A video beside others, padded alike, is what it is alone; with another key it is not."""
    network = load(moments, dropout=0.5, drop_path=0.5).train()
    draws = torch.tensor([11, 12, 13])
    whole = network(*moments.inputs, draws=draws)
    order = torch.tensor([2, 0])
    part = network(*(values[order] for values in moments.inputs), draws=draws[order])
    torch.testing.assert_close(part.logits, whole.logits[order], rtol=1e-5, atol=1e-5)
    other = network(*moments.inputs, draws=draws + 1)
    assert relative(other.logits, whole.logits) > 1e-2
    torch.testing.assert_close(network(*moments.inputs, draws=draws).logits, whole.logits, rtol=0, atol=0)


def test_nothing_is_dropped_in_an_evaluation(moments):
    inputs, outputs = moments.of_video(1), []
    for dropout in (0.0, 0.5):
        network = load(moments, dropout=dropout, drop_path=dropout).eval()
        outputs.append(network(*inputs).logits)
    assert torch.equal(*outputs)


def test_a_training_without_keys_is_refused(moments):
    with pytest.raises(ValueError, match=r"a batch in training has draws \(B,\)"):
        load(moments, dropout=0.5).train()(*moments.inputs)


@pytest.mark.parametrize(("what", "line"), [("frames", "8 frames are padding"), ("words", "3 words are padding")])
def test_a_padded_evaluation_is_refused(moments, what, line):
    patches, cls, words, word_mask, frame_mask = moments.inputs
    masks = (None, frame_mask) if what == "frames" else (word_mask, None)
    with pytest.raises(StoreMismatchError, match=f"{line}: evaluate one video at a time"):
        load(moments).eval()(patches, cls, words, *masks)


def test_inputs_of_other_sizes_are_refused(moments):
    network = load(moments).eval()
    patches, cls, words = moments.of_video(0)
    for wrong, line in (
        ((patches[:, :, 1:], cls[:, :, 1:], words), r"takes 4 layers of 9 patches, .* found patches \(1, 12, 3, 9, 64"),
        ((patches[:, :, :, 1:], cls, words), r"takes 4 layers of 9 patches"),
        ((patches, cls[:, 1:], words), r"class tokens \(1, 11, 4, 64\)"),
        ((patches, cls, words[:, 1:]), r"takes words \(B, 4 or more layers, M, 48\); found \(1, 3, 6, 48\)"),
        ((patches, cls, words[..., 1:]), r"found \(1, 4, 6, 47\)"),
        ((patches[:, :1].expand(-1, 1025, -1, -1, -1), cls[:, :1].expand(-1, 1025, -1, -1), words), "found 1025"),
    ):
        with pytest.raises(StoreMismatchError, match=line):
            network(*wrong)


def test_of_more_text_layers_the_last_are_read(moments):
    network = load(moments).eval()
    patches, cls, words = moments.of_video(0)
    more = torch.cat([torch.randn_like(words[:, :2]), words], dim=1)
    assert torch.equal(network(patches, cls, more).logits, network(patches, cls, words).logits)


def test_it_takes_a_batch_as_the_loader_hands_it_over(moments):
    patches, cls, words, word_mask, frame_mask = moments.inputs
    texts = TextBatch(None, word_mask, None, words)
    batch = ClipBatch(None, patches, cls, torch.arange(3), texts, frame_mask, torch.arange(3))
    assert {tensor.data_ptr() for tensor in batch.tensors()} >= {batch.draws.data_ptr(), words.data_ptr()}
    network = load(moments).train()
    assert torch.equal(network(*network.inputs(batch), None).logits, network(*moments.inputs).logits)


def test_levels_of_a_short_video_are_left_out():
    assert list_points((1, 2, 4, 8), 5)[:, [0, 3]].tolist() == [
        *([place, 1] for place in range(5)),
        *([place, 2] for place in (0, 2)),
        [0, 4],
    ]
    assert list_points((1, 2, 4, 8), 5)[:, 1:3].unique(dim=0).tolist() == [[0, 2], [2, 4], [4, 8]]
    assert list_points((1,), 2)[:, 1:].tolist() == [[0, math.inf, 1]] * 2


def test_positions_are_shares_of_the_length():
    found, share = embed_positions(3, 4), 2 * math.pi / (3 + 1e-6)
    for t in range(3):
        angles = [(t + 1) * share / 10000 ** (2 * (c // 2) / 4) for c in range(4)]
        expected = [math.sin(angles[0]), math.cos(angles[1]), math.sin(angles[2]), math.cos(angles[3])]
        assert found[t].tolist() == pytest.approx(expected, abs=1e-6)


def test_sizes_are_those_of_the_released_networks():
    """Parameters counted on the reference's code."""
    highlights = dict(strides=(1,), has_boundaries=False, has_times=False)
    for width, text_width, more, counted in (
        (768, 512, {}, 2_836_242),
        (768, 512, highlights, 1_846_281),
        (1024, 768, {}, 2_968_338),
    ):
        with torch.device("meta"):
            network = R2Network(num_layers=4, width=width, text_width=text_width, num_patches=49, **more)
        assert sum(parameter.numel() for parameter in network.parameters()) == counted


def test_every_name_of_a_released_file_has_its_place(golden, data_path):
    """With `module.` before names too; sizes follow from shapes, and what is strange is refused."""
    state = torch.load(data_path / "r2_tuning" / golden.name / "checkpoint.pt", weights_only=True)["state_dict"]
    assert {name for name in state if rename(name) is None} == {name for name in state if UNUSED.match(name)}
    network = build(golden.config)
    assert {rename(f"module.{name}") for name in state} - {None} == set(network.state_dict())
    sizes = read_sizes(golden.state)
    assert sizes["width"] == golden.config["backbone_width"] and sizes["has_times"] == golden.config["time_features"]
    other = R2Network(**sizes, num_patches=golden.config["patches"], num_heads=golden.config["heads"], dropout=0.0)
    other.load_state_dict(golden.state)
    with pytest.raises(WeightsError, match=r"R2-Tuning has no pyramid\.blocks\.1\.2\.weight, strange"):
        rename_state({**state, "pyramid.blocks.1.2.weight": state["coef"], "strange": state["coef"]})
    name = "recurrence.video_map.reduce.weight"
    with pytest.raises(WeightsError, match=r"it reads tokens of \d+ channels"):
        read_sizes({**golden.state, name: torch.cat([golden.state[name], golden.state[name][:, :3]], dim=1)})
    with pytest.raises(WeightsError, match="it lacks recurrence.scale"):
        read_sizes({})


def optimise(network, recipe):
    """The optimiser of a recipe, and what it does to each parameter."""
    config = TrainConfig(
        features=None,
        out=None,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
        undecayed=recipe.undecayed,
    )
    optimizer = make_optimizer(network.parameter_groups(), config, Optimisation(), find_biases(network))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return optimizer, {
        names[id(p)]: (group["weight_decay"], group["rate_share"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_decay_and_rates_are_the_references(golden, data_path):
    """All parameters decay, norms, biases and gates among them; what has no gradient is not trained here."""
    told = json.loads((data_path / "r2_tuning/groups.json").read_text())[golden.name]
    recipe = R2_TUNING_PRESETS[0].recipe
    optimizer, found = optimise(build(golden.config), recipe)
    trained = {rename(name): facts for name, facts in told["trained"].items() if name not in told["no_gradient"]}
    assert found == {name: (facts["weight_decay"], facts["rate"]) for name, facts in trained.items()}
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8
    assert recipe.clip_norm == 35


def test_new_networks_begin_as_the_references_in_distribution(golden, data_path):
    """Mean, spread and furthest value of eight networks beside those of the reference's five."""
    told = json.loads((data_path / "r2_tuning/init.json").read_text())["parameters"][golden.name]
    drawn = []
    for seed in range(8):
        torch.manual_seed(seed)
        drawn.append(dict(build(golden.config).named_parameters()))
    assert {rename(name) for name in told} == set(drawn[0])
    for theirs, facts in told.items():
        values = torch.stack([parameters[rename(theirs)].detach() for parameters in drawn])
        values = values.flatten(1).double().numpy()
        assert values.shape[1] == np.prod(facts["shape"]), theirs
        if facts["constant"]:
            np.testing.assert_array_equal(values, facts["value"], err_msg=theirs)
            continue
        fewest = min(values.size, 5 * values.shape[1])
        if fewest < 100:  # a bias of one or two numbers tells of no spread
            continue
        spread = float(np.sqrt(np.mean(np.square(facts["std"]))))
        assert values.std() == pytest.approx(spread, rel=0.03 + 2.5 / fewest**0.5), theirs
        assert abs(values.mean()) < 5 * spread / values.size**0.5, theirs
        # A uniform distribution ends at 1.73 deviations, a normal one does not.
        furthest = np.abs(values - values.mean()).max() / values.std()
        assert (furthest < 2.2) == (facts["farthest_over_std"] < 2.2), theirs


def test_heads_and_losses_are_of_float32_in_a_step_of_16_bits(golden):
    network, exact = load(golden).train(), load(golden).train()(*golden.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(*golden.inputs)
        losses = sum_losses(golden, output)
    assert all(values is None or values.dtype in (torch.float32, torch.bool) for values in output)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert 1e-6 < relative(output.logits, exact.logits) < 0.1
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


def test_presets_are_the_released_recipes():
    """Rate, epochs, step and dropout; weights of saliency; frames, rounding, suppression; rise and fall of the rate."""
    found = {
        preset.name: (
            *(preset.recipe.epochs, preset.recipe.learning_rate, preset.recipe.step_clips, preset.sizes["dropout"]),
            *(preset.grounding.saliency_weight, preset.grounding.has_columns),
            *(preset.grounding.fps, preset.grounding.unit_s, preset.grounding.suppression),
            *(preset.grounding.warmup_steps, preset.grounding.fall_epoch, preset.grounding.repeats),
        )
        for preset in R2_TUNING_PRESETS
    }
    assert found == {
        "r2-qvhighlights": (30, 5e-4, 128, 0.5, 0.1, True, 0.5, 2.0, "normal", 500, 20, 4),
        "r2-charades": (50, 2.5e-4, 32, 0.35, 0.01, True, 1.0, 0.1, "linear", 500, 30, 1),
        "r2-ego4d": (30, 2.5e-4, 32, 0.3, 0.1, True, 0.5, None, "linear", 500, 20, 1),
        "r2-tacos": (100, 2.5e-4, 32, 0.5, 0.05, True, 0.5, None, "linear", 500, 50, 1),
        "r2-youtube": (200, 5e-4, 4, 0.5, 0.1, False, None, None, None, 50, None, 1),
        "r2-tvsum": (500, 5e-4, 4, 0.5, 0.1, False, 0.5, None, None, 50, None, 1),
    }
    for preset in R2_TUNING_PRESETS:
        recipe, is_of_moments = preset.recipe, preset.grounding.suppression is not None
        assert (recipe.weight_decay, recipe.undecayed, recipe.clip_norm) == (1e-4, "nothing", 35)
        assert (preset.width, preset.depth, preset.patch_px, preset.layers) == (768, 12, 32, (8, 9, 10, 11))
        assert preset.sizes["variant"] == ("moments" if is_of_moments else "highlights")
        assert preset.grounding.is_of_domain != is_of_moments


def test_the_rate_rises_over_steps_and_falls_at_an_epoch():
    recipe = R2_TUNING_PRESETS[0].grounding
    assert [share_of_rate(step, 0, recipe) for step in (0, 250, 499, 500)] == pytest.approx(
        [0.001, 1 - 0.999 / 2, 1 - 0.999 / 500, 1]
    )
    assert [share_of_rate(5000, epoch, recipe) for epoch in (19, 20, 29)] == pytest.approx([1, 0.1, 0.1])
    assert share_of_rate(10**6, 499, R2_TUNING_PRESETS[-1].grounding) == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (R2Options(side_width=100), "--side-width must be a multiple of the heads .* found 100 and 8"),
        (R2Options(heads=0), "found 256 and 0"),
        (R2Options(dropout=1.0), "--set dropout takes a number from 0 to below 1; found 1"),
        (R2Options(drop_path=-0.1), "--set drop_path takes a number from 0 to below 1; found -0.1"),
        (R2Options(variant="scores"), "--set variant takes moments, highlights; found 'scores'"),
    ],
)
def test_options_that_do_not_fit_are_refused(words_store, options, line):
    store = open_store(words_store)
    with pytest.raises(ConfigError, match=line):
        R2Tuning().plan(store, Outputs("grounding"), options, store.layout.layers)


@pytest.fixture(scope="module")
def words_store(captioned_folder, make_captioned_config, build_once):
    """An int8 store of rows of several lengths, without pixels, with words of the text tower's last blocks."""
    more = dict(dtype="int8", channels=48, text_layers="last2", with_pixels=False, layers="last2")
    make = lambda root: extract_dataset(  # noqa: E731
        make_captioned_config(captioned_folder, root / "words.zarr", **more, sampling="fps:2", frames=None)
    )
    return build_once("grounding-words", make) / "words.zarr"


def plan_for(store, **options):
    options = R2Options(side_width=32, heads=2, **options)
    return R2Tuning().plan(store, Outputs("grounding"), options, store.layout.layers)


def test_it_learns_from_a_store_and_answers_a_row_alone(words_store):
    """Whole rows of several lengths, padded, with keys; then one row as the reader has it."""
    store = open_store(words_store)
    shape = plan_for(store)
    torch.manual_seed(0)
    network = R2Tuning().build(R2Tuning().read_shape(json.loads(json.dumps(asdict(shape)))))
    torch.nn.init.constant_(network.recurrence.scale, 0.5)  # at first the words find nothing
    data, device = find_captioned_rows(store, "train"), torch.device("cpu")
    codec = codec_for(store, shape.layers, device)
    (plan,) = plan_whole_rows(data, batch_size=len(data), seed=0, epoch=0)
    keyed = replace(plan, draws=key_examples(0, 0, plan.rows, plan.labels))
    loader = ClipLoader.for_network(network, store, layers=shape.layers, device=device, with_texts=True)
    (batch,) = loader.load([keyed])
    assert torch.equal(batch.draws, torch.from_numpy(keyed.draws)) and batch.texts.layers.shape[1] == 2
    output = network.train()(*network.inputs(batch), codec)
    (output.logits.square().mean() + output.offsets.mean() + output.query.sum()).backward()
    # The videos have less than 8 frames: of the level that is left out there are zeros, or processes would wait.
    without = {name for name, p in network.named_parameters() if not p.grad.any() and not name.endswith(NO_GRADIENT)}
    assert without == {name for name, _ in network.named_parameters() if name.startswith("levels.2.")}
    scorer = Scorer(network, store, shape.layers, num_frames=1, batch_size=1, device=device)
    single = plan_whole_rows(data.take(np.array([0])), batch_size=1, seed=0, epoch=0)
    logits = scorer.run(single, lambda grounding: grounding.logits)
    (own,) = loader.load(single)
    with torch.inference_mode():
        alone = network.eval()(*network.inputs(own), codec)
    np.testing.assert_array_equal(logits, alone.logits.numpy())


def test_a_store_with_fewer_text_layers_is_refused(captioned_store):
    store = open_store(captioned_store)
    with pytest.raises(
        StoreMismatchError, match=r"reads words of the text tower's last \d blocks; .* of 0\. Run .*last"
    ):
        plan_for(store)


def test_what_users_have_is_what_the_golden_files_are_of(data_path):
    """The copies here against the whole set."""
    folder = Path(__file__).parents[3] / "shared/parity/r2_tuning"
    if not folder.is_dir():
        pytest.skip("../shared/parity is not here: it is not part of the repository")
    for name in (*SETS, "groups.json", "init.json"):
        files = [folder / name] if name.endswith("json") else sorted((folder / name).iterdir())
        for file in files:
            assert file.read_bytes() == (data_path / "r2_tuning" / file.relative_to(folder)).read_bytes(), file
