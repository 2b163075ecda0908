"""Our side network against the reference's own modules: golden files made by running HJYao00/Side4Video at 5d72352."""

import json

import pytest
import torch
from safetensors.torch import load_file

from s4v.errors import WeightsError
from s4v.train.official import load_official_checkpoint, rename_official


@pytest.fixture(scope="module")
def golden(data_path):
    folder = data_path / "recognition_clip"
    config = json.loads((folder / "config.json").read_text())
    io = load_file(folder / "io.safetensors")
    batch, frames = config["batch"], config["frames"]
    tokens = io["tokens"].view(batch, frames, *io["tokens"].shape[1:])
    inputs = (io["pixels"].view(batch, frames, *io["pixels"].shape[1:]), tokens[:, :, :, 1:], tokens[:, :, :, 0])
    return folder, config, inputs, io, load_file(folder / "grads.safetensors")


def load(folder, config, dtype=torch.float32):
    return load_official_checkpoint(folder / "checkpoint.pt", frames=config["frames"]).to(dtype)


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def gradients(folder, config, inputs, io, dtype):
    network = load(folder, config, dtype).train()
    output = network(*(tensor.to(dtype) for tensor in inputs))
    (output * io["train_cotangent"].to(dtype)).sum().backward()
    return output, {name: parameter.grad for name, parameter in network.named_parameters()}


def test_evaluation_output_equals_the_reference(golden):
    folder, config, inputs, io, _ = golden
    with torch.inference_mode():
        assert relative(load(folder, config)(*inputs), io["eval_output"]) < 1e-5


def test_training_output_equals_the_reference(golden):
    folder, config, inputs, io, _ = golden
    assert relative(load(folder, config).train()(*inputs), io["train_output"]) < 1e-5


def test_gradients_equal_the_reference(golden):
    """Relative to the largest gradient of the same layer, weight and bias together.

    Batch norm makes the gradients of biases before it sums that nearly cancel (that of stem.bias is zero): relative
    to their own size both sides are rounding. The next test compares them without that rounding on our side.
    """
    folder, config, inputs, io, grads = golden
    expected = rename_official(grads)
    assert len(expected) == len(grads) == 26, "every golden gradient has a place in our network"
    _, found = gradients(folder, config, inputs, io, torch.float32)
    scale: dict[str, float] = {}
    for name, tensor in expected.items():
        layer = name.rpartition(".")[0]
        scale[layer] = max(scale.get(layer, 0.0), tensor.abs().max().item())
    # The golden files hold no gradient of the stem's and of the MLP's weights: take ours for their scale.
    for layer in ("stem", "blocks.0.mlp.0", "blocks.0.mlp.2"):
        scale[layer] = found[f"{layer}.weight"].abs().max().item()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs().max().item() / scale[name.rpartition(".")[0]]
        assert error < 1e-5, (name, error)


def test_gradients_equal_the_reference_in_double_precision(golden):
    """Each tensor relative to its own size; what is left is the rounding of the golden file itself (1.1e-5)."""
    folder, config, inputs, io, grads = golden
    _, found = gradients(folder, config, inputs, io, torch.float64)
    for name, tensor in rename_official(grads).items():
        if name == "stem.bias":  # zero but for rounding
            assert found[name].abs().max() < 1e-12
            continue
        assert relative(tensor.double(), found[name]) < 2e-5, name


def test_module_prefix_makes_no_difference(golden, tmp_path):
    folder, _, inputs, io, _ = golden
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    state = {f"module.{name}": tensor for name, tensor in checkpoint["model_state_dict"].items()}
    torch.save({"model_state_dict": state}, tmp_path / "prefixed.pt")
    network = load_official_checkpoint(tmp_path / "prefixed.pt", frames=4)
    with torch.inference_mode():
        assert relative(network(*inputs), io["eval_output"]) < 1e-5


def test_checkpoints_that_are_not_ours_to_read_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    torch.save({"model_state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="not a checkpoint of plain tensors"):
        load_official_checkpoint(tmp_path / "evil.pt", frames=4)
    torch.save({"model_state_dict": {"visual.proj": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="not a CLIP recognition checkpoint of Side4Video: no tensor for position"):
        load_official_checkpoint(tmp_path / "other.pt", frames=4)
    for content in ([torch.zeros(2)], torch.zeros(2), {5: torch.zeros(2)}):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(WeightsError, match="not a CLIP recognition checkpoint"):
            load_official_checkpoint(tmp_path / "odd.pt", frames=4)
    for content in (b"", b"hello world"):
        (tmp_path / "text.pt").write_bytes(content)
        with pytest.raises(WeightsError, match="not a checkpoint of plain tensors"):
            load_official_checkpoint(tmp_path / "text.pt", frames=4)
    with pytest.raises(WeightsError, match="not a checkpoint of plain tensors"):
        load_official_checkpoint(tmp_path / "none.pt", frames=4)


def test_checkpoint_that_lacks_a_tensor_is_refused(golden, tmp_path):
    folder, *_ = golden
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model_state_dict"]
    del state["visual.transformer.side_transformer.0.bn_1.weight"]
    torch.save({"model_state_dict": state}, tmp_path / "part.pt")
    with pytest.raises(WeightsError, match="not a whole CLIP recognition checkpoint"):
        load_official_checkpoint(tmp_path / "part.pt", frames=4)
