"""Released checkpoints as networks: golden files in the layout of HJYao00/Side4Video at 5d72352, and wrong ones."""

import logging
import re
import subprocess
import sys

import pytest
import torch

from s4v.errors import WeightsError
from s4v.tests.golden.cases import read_case, relative
from s4v.train.paper.checkpoint_names import (
    describe_unused,
    load_official_checkpoint,
    read_official_checkpoint,
)

VARIANTS = ("recognition_clip", "recognition_eva", "retrieval_clip", "retrieval_eva")


def read_state(case):
    checkpoint = torch.load(case.folder / "checkpoint.pt", weights_only=True)
    return dict(checkpoint.get("model_state_dict", checkpoint))


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request):
    return read_case(request.param)


@pytest.fixture(scope="module")
def recognition_clip():
    return read_case("recognition_clip")


def load(golden):
    return load_official_checkpoint(golden.folder / "checkpoint.pt", frames=golden.config["frames"])


def test_the_backbone_is_left_out_and_reported(golden, caplog):
    official = read_official_checkpoint(golden.folder / "checkpoint.pt")
    place = "transformer.resblocks" if golden.subject.family == "clip" else "blocks"
    told = [name for name in official.unused if name.endswith(place)]
    assert len(told) == 1
    kept = sum(t.numel() for t in official.build().state_dict().values())
    assert kept + 1 < sum(t.numel() for t in read_state(golden).values())
    with caplog.at_level(logging.INFO):
        load(golden)
    assert f"not used: {describe_unused(official.unused)}" in caplog.text
    assert f"{place} (" in caplog.text


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_module_prefix_and_wrapping_make_no_difference(golden, tmp_path, is_wrapped):
    state = {f"module.{name}": tensor for name, tensor in read_state(golden).items()}
    torch.save({"model_state_dict": state} if is_wrapped else state, tmp_path / "prefixed.pt")
    network = load_official_checkpoint(tmp_path / "prefixed.pt", frames=4)
    with torch.inference_mode():
        assert relative(network(*golden.inputs), golden.io["eval_output"]) < 1e-5


def test_what_retrieval_trained_beside_the_vision_tower_is_kept(data_path, tmp_path):
    golden = read_case("retrieval_eva")
    state = read_state(golden) | {"clip.text.proj": torch.ones(2, 3), "video_weight_fc.0.weight": torch.ones(4)}
    torch.save(state, tmp_path / "with_text.pt")
    official = read_official_checkpoint(tmp_path / "with_text.pt")
    assert set(official.text) == {"clip.text.proj"}
    assert "interaction.frame_weight.0.weight" in official.state
    assert not set(official.text) & set(official.unused)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_large_backbone_is_not_read(recognition_clip, tmp_path):
    """Memory grows by what the side network holds (2 MB), not by the 256 MB beside it."""
    state = read_state(recognition_clip) | {"visual.transformer.resblocks.0.mlp.c_fc.weight": torch.ones(2**26)}
    torch.save({"model_state_dict": state}, tmp_path / "large.pt")
    code = (
        "from pathlib import Path\nfrom s4v.train.paper.checkpoint_names import load_official_checkpoint as load\n"
        # Not ru_maxrss, which a new process takes over from the one that started it.
        "lines = lambda: Path('/proc/self/status').read_text().splitlines()\n"
        "peak = lambda: next(int(line.split()[1]) for line in lines() if line.startswith('VmHWM'))\n"
        f"load({str(recognition_clip.folder / 'checkpoint.pt')!r}, frames=4)\nbefore = peak()\n"
        f"load({str(tmp_path / 'large.pt')!r}, frames=4)\nprint(peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 32 * 1024, "kB"


def test_layers_are_asked_for_where_the_names_leave_them_open(recognition_clip, tmp_path):
    state = {name: t for name, t in read_state(recognition_clip).items() if ".resblocks." not in name}
    torch.save({"model_state_dict": state}, tmp_path / "alone.pt")
    with pytest.raises(
        WeightsError, match="holds 2 side blocks and no backbone: which it reads is left open.*--layers"
    ):
        load_official_checkpoint(tmp_path / "alone.pt", frames=4)
    assert read_official_checkpoint(tmp_path / "alone.pt", layers=(7, 3)).shape.layers == (3, 7)
    with pytest.raises(WeightsError, match="--layers must name 2 backbone blocks; found 3"):
        read_official_checkpoint(tmp_path / "alone.pt", layers=(1, 2, 3))
    with pytest.raises(WeightsError, match="a backbone of 2 blocks: --layers 1,2 are not all among them"):
        read_official_checkpoint(recognition_clip.folder / "checkpoint.pt", layers=(1, 2))


def test_checkpoints_that_are_not_ours_to_read_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    torch.save({"model_state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="not a whole checkpoint of plain tensors"):
        load_official_checkpoint(tmp_path / "evil.pt", frames=4)
    torch.save({"model_state_dict": {"visual.proj": torch.zeros(2, 2)}}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="is not a checkpoint of .*Side4Video.*: none of its 1 tensors has a name"):
        load_official_checkpoint(tmp_path / "other.pt", frames=4)
    for content in ([torch.zeros(2)], torch.zeros(2), {5: torch.zeros(2)}):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(WeightsError, match="none of its [01] tensors has a name of their side"):
            load_official_checkpoint(tmp_path / "odd.pt", frames=4)
    for content in (b"", b"hello world"):
        (tmp_path / "text.pt").write_bytes(content)
        with pytest.raises(WeightsError, match="not a whole checkpoint of plain tensors"):
            load_official_checkpoint(tmp_path / "text.pt", frames=4)
    with pytest.raises(WeightsError, match="none.pt: no such file. Name a checkpoint"):
        load_official_checkpoint(tmp_path / "none.pt", frames=4)


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_truncated_checkpoint_is_refused_in_one_line(golden, tmp_path, share):
    whole = (golden.folder / "checkpoint.pt").read_bytes()
    (tmp_path / "part.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match="not a whole checkpoint of plain tensors") as caught:
        load_official_checkpoint(tmp_path / "part.pt", frames=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "lost"),
    [
        ("recognition_clip", "visual.transformer.side_transformer.0.bn_1.weight"),
        ("recognition_eva", "visual.side_blocks.1.attn.k_proj.bias"),
        ("retrieval_clip", "clip.visual.ln_post.bias"),
        ("retrieval_eva", "clip.visual.side_post_bn.running_var"),
    ],
)
def test_checkpoint_that_lacks_a_tensor_is_refused(data_path, tmp_path, variant, lost):
    state = read_state(read_case(variant))
    del state[lost]
    torch.save(state, tmp_path / "part.pt")
    task, family = variant.split("_")
    with pytest.raises(WeightsError, match=f"not a whole {family.upper()} {task} checkpoint") as caught:
        load_official_checkpoint(tmp_path / "part.pt", frames=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("visual.side_conv1.weight", (128, 3, 8, 8), "tensors of other shapes"),
        ("visual.transformer.side_spatial_position_embeddings", (9,), "tensors of other shapes"),
        ("visual.transformer.side_spatial_position_embeddings", (9, 100), "side blocks of width 100"),
        ("visual.transformer.side_linears.0.weight", (128,), "tensors of other shapes"),
        ("visual.transformer.side_linears.0.weight", (128, 32), "not a whole CLIP recognition checkpoint.*mismatch"),
        ("fc.bias", (), "tensors of other shapes"),
    ],
)
def test_odd_shapes_are_one_clear_line(recognition_clip, tmp_path, name, shape, message):
    torch.save(read_state(recognition_clip) | {name: torch.zeros(shape)}, tmp_path / "odd.pt")
    with pytest.raises(WeightsError, match=message) as caught:
        load_official_checkpoint(tmp_path / "odd.pt", frames=4)
    assert "\n" not in str(caught.value)


def test_retrieval_must_tap_the_last_block(data_path):
    with pytest.raises(WeightsError, match="reads the last block, 3: --layers must hold it"):
        read_official_checkpoint(data_path / "retrieval_eva/checkpoint.pt", layers=(0, 1))


def test_side_blocks_without_their_head_are_refused(recognition_clip, tmp_path):
    state = {name: t for name, t in read_state(recognition_clip).items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "headless.pt")
    with pytest.raises(WeightsError, match=r"neither a classifier fc \(recognition\) nor visual.side_proj"):
        load_official_checkpoint(tmp_path / "headless.pt", frames=4)


def test_another_systems_file_is_not_taken_for_side4videos(recognition_clip, tmp_path):
    """Nothing of a side network is left out in silence; by one tensor of TDS-CLIP's it is TDS-CLIP's, and not whole."""
    state = read_state(recognition_clip)
    for name in ("visual.side_gate", "module.visual.transformer.side_transformer.0.mix.weight"):
        torch.save({"model_state_dict": state | {name: torch.ones(3)}}, tmp_path / "more.pt")
        with pytest.raises(WeightsError, match=f"holds 1 tensors of a side network .* no place for: {name}. It is"):
            load_official_checkpoint(tmp_path / "more.pt", frames=4)
    for twice in ("visual.side_lns.0.weight", "module.visual.transformer.side_lns.0.weight"):
        torch.save(state | {twice: torch.ones(64)}, tmp_path / "twice.pt")
        with pytest.raises(WeightsError, match=f"holds 2 tensors of a side network .*{twice}"):
            load_official_checkpoint(tmp_path / "twice.pt", frames=4)
    for name in ("visual.transformer.side_transformer.0.mse.conv1.weight", "module.visual.side_conv1_c5.weight"):
        torch.save({"model_state_dict": state | {name: torch.ones(8, 128, 3, 8, 8)}}, tmp_path / "tds.pt")
        with pytest.raises(WeightsError, match="TDS-CLIP"):
            load_official_checkpoint(tmp_path / "tds.pt", frames=4)


def test_side_tensors_beside_retrievals_text_tower_are_refused_too(data_path, tmp_path):
    state = read_state(read_case("retrieval_eva"))
    torch.save(state | {"clip.text.side_adapter.weight": torch.ones(2, 3)}, tmp_path / "more.pt")
    with pytest.raises(WeightsError, match="no place for: clip.text.side_adapter.weight"):
        load_official_checkpoint(tmp_path / "more.pt", frames=4)
    torch.save(state | {"clip.text.inside.weight": torch.ones(2, 3)}, tmp_path / "other.pt")
    assert "clip.text.inside.weight" in read_official_checkpoint(tmp_path / "other.pt").text


def test_released_retrieval_files_are_half_precision_in_places(data_path, tmp_path):
    """Linear, convolution and attention weights, as beside CLIP: read as what they are, and computed in float32."""
    golden = read_case("retrieval_clip")
    halves = {
        name: tensor.half()
        if re.search(r"(linears|conv|attn|mlp|proj).*weight|side_proj|visual\.proj", name)
        else tensor
        for name, tensor in read_state(golden).items()
    }
    assert sum(tensor.dtype == torch.float16 for tensor in halves.values()) > 20
    torch.save(halves, tmp_path / "half.pt")
    network = load_official_checkpoint(tmp_path / "half.pt", frames=4)
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    with torch.inference_mode():
        error = relative(network(*golden.inputs), golden.io["eval_output"])
    assert 1e-6 < error < 5e-3, "rounding of the weights, and no more"
