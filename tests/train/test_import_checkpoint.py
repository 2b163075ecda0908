"""Released checkpoints as runs. One that fits the tests' stores is a run of ours under the reference's names."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from s4v.backbone.text_tower import load_text_tower
from s4v.cli import app
from s4v.errors import ConfigError, RunExistsError, StoreMismatchError, WeightsError
from s4v.retrieve.search import search_store
from s4v.store.reader import open_store
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.paper.import_checkpoint import import_checkpoint
from s4v.train.run_folder import load_checkpoint, open_run

VISUAL, LADDER = r"visual.", r"visual.transformer."
OFFICIAL = (
    (r"^stem\.norm\.", VISUAL + "side_pre_bn3d."),
    (r"^stem\.", VISUAL + "side_conv1."),
    (r"^norm\.", VISUAL + "side_post_bn."),
    (r"^classifier\.", "fc."),
    (r"^widen\.weight$", VISUAL + "side_proj"),
    (r"^end\.norm\.", VISUAL + "ln_post."),
    (r"^end\.project\.weight$", VISUAL + "proj"),
    (r"^interaction\.text_weight\.", "text_weight_fc."),
    (r"^interaction\.frame_weight\.", "video_weight_fc."),
    (r"^position$", LADDER + "side_spatial_position_embeddings"),
    (r"^taps\.(\d+)\.norm\.", LADDER + r"side_lns.\1."),
    (r"^taps\.(\d+)\.project\.", LADDER + r"side_linears.\1."),
    (r"^blocks\.(\d+)\.temporal_norm\.", LADDER + r"side_transformer.\1.bn_1."),
    (r"^blocks\.(\d+)\.temporal\.expand\.", LADDER + r"side_transformer.\1.conv.0."),
    (r"^blocks\.(\d+)\.temporal\.project\.", LADDER + r"side_transformer.\1.conv.2."),
    (r"^blocks\.(\d+)\.temporal\.", LADDER + r"side_transformer.\1.conv.1."),
    (r"^blocks\.(\d+)\.attention_norm\.", LADDER + r"side_transformer.\1.ln_1."),
    (r"^blocks\.(\d+)\.attention\.qkv\.", LADDER + r"side_transformer.\1.attn.in_proj_"),
    (r"^blocks\.(\d+)\.attention\.project\.", LADDER + r"side_transformer.\1.attn.out_proj."),
    (r"^blocks\.(\d+)\.mlp_norm\.", LADDER + r"side_transformer.\1.bn_2."),
    (r"^blocks\.(\d+)\.mlp\.0\.", LADDER + r"side_transformer.\1.mlp.fc1."),
    (r"^blocks\.(\d+)\.mlp\.2\.", LADDER + r"side_transformer.\1.mlp.fc2."),
)


def as_official(network, patch_px):
    """A network beside CLIP in the reference's names and shapes."""
    state = {}
    for name, tensor in network.state_dict().items():
        if name == "logit_scale":
            continue  # the text tower's, in the reference's files
        new_name = next(re.sub(ours, theirs, name) for ours, theirs in OFFICIAL if re.search(ours, name))
        if name == "stem.weight":
            tensor = tensor.unflatten(2, (3, patch_px, patch_px)).permute(1, 2, 0, 3, 4)
        elif name.endswith("temporal.weight"):
            tensor = tensor.T[:, None, :, None, None]
        elif re.search(r"temporal\.(expand|project)\.weight", name):
            tensor = tensor[:, :, None, None, None]
        elif name in ("widen.weight", "end.project.weight"):
            tensor = tensor.T
        state[new_name] = tensor.contiguous()
    return state


@pytest.fixture(scope="module")
def trained(int8_store, tmp_path_factory):
    """A run of ours, and its best weights as the reference would have saved them, with a backbone of 6 blocks."""
    folder = tmp_path_factory.mktemp("official")
    train_run(TrainConfig(features=int8_store, out=folder / "run", epochs=1, batch_size=4, side_width=64, device="cpu"))
    state = as_official(load_checkpoint(open_run(folder / "run")), patch_px=8)
    head = open_store(int8_store).head
    state |= {f"visual.transformer.resblocks.{block}.ln_1.bias": torch.zeros(192) for block in range(6)}
    state |= {"visual.ln_post.weight": torch.from_numpy(head["norm_weight"]).half()}
    torch.save({"epoch": 1, "model_state_dict": state}, folder / "official.pt")
    return folder / "run", folder / "official.pt", state


def figures(run, **options):
    found = evaluate_run(run, **options)
    return {name: found[name] for name in ("top1", "loss", "videos", "confusion", "classes")}


def test_an_imported_run_evaluates_like_the_run_that_it_was(trained, int8_store, tmp_path):
    run, checkpoint, _ = trained
    summary = import_checkpoint(checkpoint, tmp_path / "in", frames=4, features=int8_store)
    assert summary["variant"] == {"task": "recognition", "family": "clip"}
    assert summary["layers"] == [0, 1, 2, 3, 4, 5]
    assert {"width", "blocks of the backbone", "classes", "layers", "norm.weight"} <= set(summary["checked"])
    assert summary["unused"]["visual.transformer.resblocks"] == 6
    assert figures(tmp_path / "in") == figures(run)
    config = open_run(tmp_path / "in").config
    assert config["imported_from"] == str(checkpoint.resolve())
    assert len(config["checkpoint_sha256"]) == 64


def test_a_run_imported_without_a_store_takes_the_one_it_is_evaluated_on(trained, int8_store, tmp_path, caplog):
    run, checkpoint, _ = trained
    assert import_checkpoint(checkpoint, tmp_path / "in", frames=4)["checked"] == []
    with pytest.raises(ConfigError, match="was imported without a store: name the one to evaluate on with --features"):
        evaluate_run(tmp_path / "in")
    assert figures(tmp_path / "in", features=int8_store) == figures(run)
    assert "names no classes: taken in the order" in caplog.text


def test_a_run_imported_without_a_store_refuses_what_it_can_tell_does_not_fit(data_path, int8_store, tmp_path):
    import_checkpoint(data_path / "recognition_clip/checkpoint.pt", tmp_path / "in", frames=4)
    with pytest.raises(StoreMismatchError) as caught:
        evaluate_run(tmp_path / "in", features=int8_store)
    for part in ("backbone width: 192 in the store, 64 in the run", "classes: 2 in the store, 7 in the run"):
        assert part in str(caught.value)


def test_the_side_blocks_and_patches_of_a_run_imported_without_a_store_are_compared(
    trained, int8_store, eva_store, tmp_path
):
    _, checkpoint, _ = trained
    import_checkpoint(checkpoint, tmp_path / "in", frames=4)
    with pytest.raises(StoreMismatchError, match="side blocks: EVA's beside the store's, CLIP's in the run"):
        evaluate_run(tmp_path / "in", features=eva_store)
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["head"]["patch_px"] = 16
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    with pytest.raises(StoreMismatchError, match="patches: of 8 px in the store, of 16 px in the run"):
        evaluate_run(tmp_path / "in", features=int8_store)


def test_a_checkpoint_beside_another_backbone_is_refused_with_all_differences(data_path, int8_store, tmp_path):
    with pytest.raises(StoreMismatchError) as caught:
        import_checkpoint(data_path / "recognition_eva/checkpoint.pt", tmp_path / "in", features=int8_store)
    for part in (
        "width: 64 here, 192 there",
        "family of side blocks: eva here, clip there",
        "blocks of the backbone: 4 here, 6 there",
        "classes: 7 here, 2 there",
        "the tower's norm.weight: shape (64,) here, (192,) there",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "in").exists()


def test_other_weights_of_the_same_size_are_refused(trained, int8_store, tmp_path):
    _, _, state = trained
    torch.save(state | {"visual.ln_post.weight": torch.full((192,), 0.5)}, tmp_path / "other.pt")
    with pytest.raises(StoreMismatchError, match="the tower's norm.weight differs by .*another backbone's weights"):
        import_checkpoint(tmp_path / "other.pt", tmp_path / "in", features=int8_store)


@pytest.mark.parametrize("variant", ["recognition_eva", "retrieval_clip", "retrieval_eva"])
def test_every_variant_opens_as_the_network_that_was_imported(data_path, tmp_path, variant):
    folder = data_path / variant
    import_checkpoint(folder / "checkpoint.pt", tmp_path / "in", frames=4)
    io = load_file(folder / "io.safetensors")
    tokens = io["tokens"].view(2, 4, 2, 10, 64)
    network = load_checkpoint(open_run(tmp_path / "in"))
    with torch.inference_mode():
        found = network(io["pixels"].view(2, 4, 3, 24, 24), tokens[..., 1:, :], tokens[..., 0, :])
    assert (found - io["eval_output"]).abs().max() < 1e-5 * io["eval_output"].abs().max()


def test_a_retrieval_run_keeps_its_text_tower_and_says_what_it_cannot_do(data_path, tmp_path, int8_store):
    state = torch.load(data_path / "retrieval_eva/checkpoint.pt", weights_only=True)
    torch.save(state | {"clip.text.proj": torch.ones(2, 3)}, tmp_path / "with_text.pt")
    import_checkpoint(tmp_path / "with_text.pt", tmp_path / "in")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "in/text.safetensors").items()}
    assert shapes["clip.text.proj"] == (2, 3)
    with pytest.raises(StoreMismatchError, match="does not fit the run"):
        evaluate_run(tmp_path / "in", features=int8_store)
    torch.save(state | {"module.video_weight_fc.bias": torch.ones(1)}, tmp_path / "half.pt")
    with pytest.raises(WeightsError, match="is not a whole EVA retrieval checkpoint of Side4Video: .*text_weight"):
        import_checkpoint(tmp_path / "half.pt", tmp_path / "half")


@pytest.fixture(scope="module", params=[pytest.param("mean", marks=pytest.mark.slow), "wti"])
def trained_retrieval(request, captioned_store, tmp_path_factory):
    """A run of ours, and what of it the reference's file would hold; the text tower is not in it."""
    out = tmp_path_factory.mktemp("retrieval") / request.param
    recipe = dict(epochs=2, batch_size=4, side_width=64, learning_rate=1e-2, device="cpu")
    kind = dict(task="retrieval", interaction=request.param)
    train_run(TrainConfig(features=captioned_store, out=out, **recipe, **kind))
    run = open_run(out)
    state = as_official(load_checkpoint(run), run.shape.patch_px)
    return out, {name if "weight_fc" in name else f"clip.{name}": tensor for name, tensor in state.items()}


def text_tower_of(seed):
    tower = load_text_tower("tiny-clip", weights=f"random:{seed}", device=torch.device("cpu"))
    return {f"clip.{name}": tensor for name, tensor in tower._tower.state_dict().items()}


def test_an_imported_retrieval_run_compares_with_its_own_text_tower(trained_retrieval, captioned_store, tmp_path):
    ours, state = trained_retrieval
    layers = open_run(ours).shape.layers
    found, answers = {}, {}
    for seed in (0, 1):  # the store's own text tower, and another
        torch.save(state | text_tower_of(seed), tmp_path / f"{seed}.pt")
        theirs = tmp_path / f"in{seed}"
        frames = open_run(ours).frames
        import_checkpoint(tmp_path / f"{seed}.pt", theirs, layers=layers, frames=frames, features=captioned_store)
        assert open_run(theirs).shape.interaction == open_run(ours).shape.interaction
        result = CliRunner().invoke(app, ["eval", "--run", str(theirs), "--json"], catch_exceptions=False)
        found[seed] = json.loads(result.stdout)
        answers[seed] = search_store(captioned_store, "a red ring moves left", run=theirs, top=12)
    expected = evaluate_run(ours)
    assert found[0]["frozen"] == found[1]["frozen"] == expected["frozen"]
    for direction in ("text_to_video", "video_to_text"):
        assert found[0][direction] == pytest.approx(expected[direction])
    ranked = [(a.video_id, a.score) for a in search_store(captioned_store, "a red ring moves left", run=ours, top=12)]
    assert [a.video_id for a in answers[0]] == [video for video, _ in ranked]
    assert [a.score for a in answers[0]] == pytest.approx([score for _, score in ranked], abs=1e-5)
    assert [a.score for a in answers[1]] != pytest.approx([score for _, score in ranked], abs=1e-3)


def test_an_imported_run_without_a_text_tower_is_told(trained_retrieval, captioned_store, tmp_path):
    ours, state = trained_retrieval
    torch.save(state, tmp_path / "no_text.pt")
    layers, frames = open_run(ours).shape.layers, open_run(ours).frames
    import_checkpoint(tmp_path / "no_text.pt", tmp_path / "in", layers=layers, frames=frames, features=captioned_store)
    with pytest.raises(ConfigError, match="its checkpoint held no text tower"):
        search_store(captioned_store, "a ring", run=tmp_path / "in")
    result = CliRunner().invoke(app, ["eval", "--run", str(tmp_path / "in")])
    assert result.exit_code == 1 and "its checkpoint held no text tower" in result.stderr


def test_nothing_is_written_where_something_is_wrong(trained, tmp_path):
    run, checkpoint, _ = trained
    with pytest.raises(RunExistsError):
        import_checkpoint(checkpoint, run)
    with pytest.raises(ConfigError, match="--frames must be at least 1"):
        import_checkpoint(checkpoint, tmp_path / "in", frames=0)
    with pytest.raises(WeightsError, match="none.pt: no such file. Name a checkpoint of the reference, a .pt file"):
        import_checkpoint(tmp_path / "none.pt", tmp_path / "in")
    with pytest.raises(WeightsError, match=": a folder. Name a checkpoint"):
        import_checkpoint(tmp_path, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_the_command_says_what_it_found(trained, int8_store, tmp_path):
    _, checkpoint, _ = trained
    arguments = ["import", str(checkpoint), "--out", str(tmp_path / "in"), "--frames", "4"]
    result = CliRunner().invoke(app, [*arguments, "--features", str(int8_store)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "recognition beside CLIP, layers [0, 1, 2, 3, 4, 5]" in result.stdout
    for place in (
        "not used: ",
        "visual.transformer.resblocks (6 tensors)",
        "visual.ln_post.weight (1 tensor)",
        "epoch",
    ):
        assert place in result.stdout
    result = CliRunner().invoke(app, [*arguments[:3], str(tmp_path / "two"), "--json"], catch_exceptions=False)
    assert json.loads(result.stdout.splitlines()[-1])["variant"]["task"] == "recognition"
    result = CliRunner().invoke(app, [*arguments, "--layers", "1,2"], catch_exceptions=False)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


@pytest.fixture
def eva_store(int8_store, tmp_path):
    """The same store, said to be of an EVA backbone."""
    shutil.copytree(int8_store, tmp_path / "eva.zarr")
    (tmp_path / "eva.zarr/checksums.json").unlink()
    metadata = json.loads((tmp_path / "eva.zarr/zarr.json").read_text())
    metadata["attributes"]["s4v"]["backbone"]["architecture"] = "EVA02-E-14"
    (tmp_path / "eva.zarr/zarr.json").write_text(json.dumps(metadata))
    return tmp_path / "eva.zarr"


def test_training_beside_an_eva_backbone_takes_evas_side_blocks(eva_store, tmp_path):
    train_run(
        TrainConfig(features=eva_store, out=tmp_path / "run", epochs=1, batch_size=4, side_width=64, device="cpu")
    )
    run = open_run(tmp_path / "run")
    assert run.shape.family == "eva"
    assert load_checkpoint(run).blocks[0].is_post_norm
    assert evaluate_run(tmp_path / "run")["videos"] == 2


def test_a_run_from_before_the_families_still_opens(trained, tmp_path):
    run, _, _ = trained
    shutil.copytree(run, tmp_path / "old")
    config = json.loads((run / "config.json").read_text())
    for name in ("family", "task", "embed_dim", "norm_eps", "has_projection_bias"):
        del config["head"][name]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    assert open_run(tmp_path / "old").shape.family == "clip"
    assert figures(tmp_path / "old") == figures(run)
