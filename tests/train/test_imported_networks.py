"""TDS-CLIP's and DiST's released files as runs: those of ours under the references' names, beside a backbone."""

import json
import re
import shutil

import numpy as np
import open_clip.model
import pytest
import torch
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, StoreMismatchError, WeightsError
from s4v.store.reader import open_store
from s4v.tests.golden.cases import read_case, relative
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.paper.checkpoint_names import load_official_checkpoint, read_official_checkpoint
from s4v.train.paper.import_checkpoint import import_checkpoint
from s4v.train.run_folder import load_checkpoint, open_run, save_checkpoint

PREFIX = "backbone.base_encoder."


def as_released(network, case):
    """A network's weights under the reference's names, as a golden file of it has them, and in its shapes."""
    golden = case.read_tensors("state.safetensors")
    theirs = {}
    for name, ours in case.subject.released.translate(golden).items():
        theirs[re.sub(r"\.\d+\.", ".#.", ours, count=1)] = re.sub(r"\.\d+\.", ".#.", name, count=1), golden[name].ndim
    state = {}
    for name, tensor in network.state_dict().items():
        if name == "class_texts":
            continue
        number = re.search(r"\.(\d+)\.", name)
        new_name, num_axes = theirs[re.sub(r"\.\d+\.", ".#.", name, count=1)]
        tensor = undo_reshape(name, tensor)
        while tensor.ndim < num_axes:  # kernels of one place, learned tokens
            is_token = name.endswith(("token", "position", "query"))
            tensor = tensor[None] if is_token else tensor[..., None]
        state[new_name.replace("#", number[1]) if number else new_name] = tensor.contiguous()
    return state


def undo_reshape(name, tensor):
    """Kernels of more than one place."""
    if name.startswith("stem.") and tensor.ndim == 3:  # (K, S, C*p*p) -> (S, C, K, p, p), of patches of 8 px
        return tensor.unflatten(2, (-1, 8, 8)).permute(1, 2, 0, 3, 4)
    if name.endswith(".temporal.weight"):  # (3, S) -> (S, 1, 3)
        return tensor.T[:, None]
    if name.endswith(".time.weight"):  # (3, C, C) -> (C, C, 3)
        return tensor.permute(1, 2, 0)
    if name.endswith(".space.weight"):  # (C, C, 3, 3) -> (C, C, 1, 3, 3)
        return tensor[:, :, None]
    return tensor.unflatten(1, (2, -1)).transpose(1, 2) if name.endswith(".fuse.weight") else tensor


def figures(run, **options):
    found = evaluate_run(run, **options)
    return {name: found[name] for name in ("top1", "loss", "videos", "confusion", "classes")}


@pytest.fixture(scope="module")
def tds_clip(offsets_store, tmp_path_factory):
    """A run of ours, and the file that it would have been released as, with a backbone of 6 blocks."""
    folder = tmp_path_factory.mktemp("tds")
    config = dict(epochs=1, batch_size=4, side_width=64, device="cpu", head="tds-clip")
    train_run(TrainConfig(features=offsets_store, out=folder / "run", **config))
    state = as_released(load_checkpoint(open_run(folder / "run")), read_case("tds_clip"))
    state |= {f"visual.transformer.resblocks.{block}.ln_1.bias": torch.zeros(192) for block in range(6)}
    torch.save({"epoch": 1, "model_state_dict": state}, folder / "released.pt")
    return folder / "run", folder / "released.pt", state


def test_an_imported_tds_clip_evaluates_like_the_run_that_it_was(tds_clip, offsets_store, tmp_path):
    run, checkpoint, _ = tds_clip
    summary = import_checkpoint(checkpoint, tmp_path / "in", frames=4, features=offsets_store)
    assert (summary["network"], summary["layers"]) == ("tds-clip", [0, 1, 2, 3, 4, 5])
    assert summary["unused"] == {"visual.transformer.resblocks": 6, "epoch": 0}
    assert figures(tmp_path / "in") == figures(run)
    import_checkpoint(checkpoint, tmp_path / "alone", frames=4)
    assert figures(tmp_path / "alone", features=offsets_store) == figures(run)


def test_a_tds_clip_is_refused_beside_a_store_without_offsets(tds_clip, int8_store, tmp_path):
    with pytest.raises(StoreMismatchError, match="the store lacks pixels at offsets -2,-1,1,2"):
        import_checkpoint(tds_clip[1], tmp_path / "in", features=int8_store)
    assert not (tmp_path / "in").exists()


def test_names_of_classes_may_come_from_a_file(tds_clip, offsets_store, tmp_path):
    (tmp_path / "names.txt").write_text("walk\nrun\n")
    import_checkpoint(tds_clip[1], tmp_path / "in", frames=4, classes=tmp_path / "names.txt")
    found, others = evaluate_run(tmp_path / "in", features=offsets_store), evaluate_run(tds_clip[0])
    assert found["classes"] == ["walk", "run"] and others["classes"] == ["run", "walk"]
    assert found["top1"] == pytest.approx(1 - others["top1"]), "its outputs are named the other way round"
    (tmp_path / "names.txt").write_text("walk\nrun\nswim\n")
    with pytest.raises(WeightsError, match="has 2 classes; 3 names were given"):
        import_checkpoint(tds_clip[1], tmp_path / "two", classes=tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("walk\nswim\n")
    with pytest.raises(StoreMismatchError, match="classes that the store does not have: 'swim'"):
        import_checkpoint(tds_clip[1], tmp_path / "two", features=offsets_store, classes=tmp_path / "names.txt")


@pytest.mark.parametrize("lost", ["visual.side_conv1_c5.bias", "visual.transformer.side_transformer.5.mse.bn2.weight"])
def test_a_tds_clip_that_lacks_a_tensor_is_neither_network(tds_clip, tmp_path, lost):
    state = dict(tds_clip[2])
    del state[lost]
    torch.save({"model_state_dict": state}, tmp_path / "part.pt")
    with pytest.raises(WeightsError, match="is not a whole checkpoint of TDS-CLIP: .*Missing key"):
        load_official_checkpoint(tmp_path / "part.pt", frames=8)
    torch.save({"model_state_dict": tds_clip[2] | {"visual.side_gate": torch.ones(2)}}, tmp_path / "more.pt")
    with pytest.raises(WeightsError, match="that TDS-CLIP's has no place for: visual.side_gate"):
        load_official_checkpoint(tmp_path / "more.pt", frames=8)


def test_a_tds_clip_of_other_offsets_is_refused(tds_clip, tmp_path):
    name = "visual.side_conv1_c5.weight"
    torch.save(tds_clip[2] | {name: tds_clip[2][name][:, :6]}, tmp_path / "three.pt")
    with pytest.raises(WeightsError, match="has a second stem on 3 frames: TDS-CLIP's sees 5"):
        read_official_checkpoint(tmp_path / "three.pt")


def draw_text_tower(num_words=49408):
    """CLIP's, of one block and one head."""
    torch.manual_seed(0)
    sizes = dict(context_length=77, vocab_size=num_words, width=64, heads=1, layers=1)
    tower = open_clip.model._build_text_tower(128, sizes, quick_gelu=True)
    return {name: tensor for name, tensor in tower.state_dict().items() if name != "attn_mask"}


@pytest.fixture(scope="module")
def dist(half_steps_store, tmp_path_factory):
    """A run of ours, and the file that it would have been released as, with both of CLIP's towers."""
    folder = tmp_path_factory.mktemp("dist")
    config = dict(epochs=1, batch_size=4, side_width=64, device="cpu", head="dist")
    train_run(TrainConfig(features=half_steps_store, out=folder / "run", **config))
    state = as_released(load_checkpoint(open_run(folder / "run")), read_case("dist"))
    tower = {f"visual.transformer.resblocks.{block}.ln_1.bias": torch.zeros(192) for block in range(6)}
    head = open_store(half_steps_store).head
    tower |= {"visual.ln_post.weight": torch.from_numpy(np.array(head["norm_weight"]))}
    tower |= {"visual.positional_embedding": torch.zeros(65, 192)}
    state |= {PREFIX + name: tensor for name, tensor in (tower | draw_text_tower()).items()}
    torch.save({"model_state": state}, folder / "released.pyth")
    return folder / "run", folder / "released.pyth", state


def test_an_imported_dist_evaluates_like_the_run_that_it_was(dist, half_steps_store, tmp_path):
    """With classes of a file, as texts of the tower beside it; the run's own are other texts."""
    run, checkpoint, _ = dist
    (tmp_path / "names.txt").write_text("run\nwalk\n")
    arguments = ["import", str(checkpoint), "--classes", str(tmp_path / "names.txt"), "--out", str(tmp_path / "in")]
    result = CliRunner().invoke(app, [*arguments, "--features", str(half_steps_store)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "dist, recognition beside CLIP, layers [0, 1, 2, 3, 4, 5]" in result.stdout
    assert f"{PREFIX}visual.transformer.resblocks (6 tensors)" in result.stdout
    assert "text_projection" not in result.stdout
    imported = load_checkpoint(open_run(tmp_path / "in"))
    assert open_run(tmp_path / "in").frames == 4 and imported.class_texts.shape == (2, 128)
    shutil.copytree(run, tmp_path / "own")
    own = load_checkpoint(open_run(run))
    own.take_class_texts(imported.class_texts.numpy())
    save_checkpoint(open_run(tmp_path / "own"), "best", own, {})
    result = CliRunner().invoke(app, ["eval", "--run", str(tmp_path / "in"), "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    expected = evaluate_run(tmp_path / "own")
    assert all(found[name] == expected[name] for name in ("top1", "loss", "confusion", "classes"))
    assert expected["loss"] != evaluate_run(run)["loss"]


def test_classes_of_a_store_are_texts_of_the_files_own_tower(dist, half_steps_store, tmp_path):
    import_checkpoint(dist[1], tmp_path / "in", features=half_steps_store)
    run = open_run(tmp_path / "in")
    assert run.classes == ("run", "walk")
    by_name = load_official_checkpoint(dist[1], frames=4, classes=["run", "walk"])
    assert torch.equal(load_checkpoint(run).class_texts, by_name.class_texts)
    assert not torch.equal(by_name.class_texts[0], by_name.class_texts[1])
    assert load_official_checkpoint(dist[1], frames=4).class_texts.shape == (0, 128)


def test_a_dist_without_names_of_classes_is_told_what_to_do(dist, tmp_path):
    with pytest.raises(ConfigError, match="names none: give them with --classes FILE, one a line .* --features STORE"):
        import_checkpoint(dist[1], tmp_path / "in")
    with pytest.raises(ConfigError, match="--frames 8: .* is of clips of 4 frames: leave it out"):
        import_checkpoint(dist[1], tmp_path / "in", frames=8)
    with pytest.raises(WeightsError, match="is of clips of 4 frames; found frames=8"):
        load_official_checkpoint(dist[1], frames=8)
    assert not (tmp_path / "in").exists()


RENAMED = {
    "input_linears": "input_map_feat_nets",
    "integration2temporal_nets": "s2t_fuse_nets",
    "temporal2integration_nets": "t2s_fuse_nets",
    ".integration_nets": ".spatial_nets",
    "adapooling_nets": "final_temporal_nets",
    "dist_net.": "ladder_net.",
}
"""New names of DiST's release to old ones."""


@pytest.mark.parametrize("prefix", ["", "module.", "module." + PREFIX])
def test_old_names_and_prefixes_make_no_difference(dist, tmp_path, prefix):
    state = {}
    for name, tensor in dist[2].items():
        for new, old in RENAMED.items():
            name = name.replace(new, old)
        state[prefix + name.removeprefix(PREFIX)] = tensor
    torch.save(state, tmp_path / "old.pyth")
    old, new = read_official_checkpoint(tmp_path / "old.pyth"), read_official_checkpoint(dist[1])
    assert old.shape == new.shape and old.text.keys() == new.text.keys()
    assert all(torch.equal(old.state[name], tensor) for name, tensor in new.state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dist_net.gate": torch.ones(2)}, "that DiST's has no place for: backbone.base_encoder.dist_net.gate"),
        ({"visual.side_conv1.weight": torch.ones(2)}, "that DiST's has no place for: .*visual.side_conv1.weight"),
        ({"dist_net.ln_post.bias": None}, "is not a whole checkpoint of DiST: .*Missing key"),
        ({"dist_net.proj": None}, "is not a checkpoint of DiST that s4v knows: no projection"),
        ({"visual.positional_embedding": None}, "has no visual.positional_embedding"),
        ({"dist_net.temporal_stem.weight": torch.ones(3, 3)}, "tensors of other shapes than DiST's"),
        ({"text_projection": None}, "holds no whole text tower of CLIP: no text_projection"),
        ({"token_embedding.weight": torch.ones(50, 64)}, "knows 50 words, CLIP's tokenizer has 49408"),
    ],
)
def test_files_that_are_not_whole_are_refused_in_one_line(dist, tmp_path, change, message):
    state = dist[2] | {PREFIX + name: tensor for name, tensor in change.items()}
    torch.save({"model_state": {name: t for name, t in state.items() if t is not None}}, tmp_path / "odd.pyth")
    with pytest.raises(WeightsError, match=message) as caught:
        load_official_checkpoint(tmp_path / "odd.pyth", frames=4, classes=["run", "walk"])
    assert "\n" not in str(caught.value)


def test_the_golden_files_are_read_as_what_they_are(tmp_path):
    """Without a backbone the layers must be named; the outputs are the references'."""
    for name, frames in (("tds_clip", 8), ("dist", 8)):
        case = read_case(name)
        extra = {PREFIX + "visual.positional_embedding": torch.zeros(17, 64)} if name == "dist" else {}
        torch.save({"model_state": case.read_tensors("state.safetensors") | extra}, tmp_path / "golden.pt")
        with pytest.raises(WeightsError, match="holds 4 side blocks and no backbone: which it reads is left open"):
            load_official_checkpoint(tmp_path / "golden.pt", frames=frames)
        network = load_official_checkpoint(tmp_path / "golden.pt", frames=frames, layers=(0, 1, 2, 3))
        if name == "dist":
            network.take_class_texts(case.io["text_features"].numpy())
        with torch.inference_mode():
            assert relative(network(*case.inputs), case.io["eval_output"]) < 1e-5
