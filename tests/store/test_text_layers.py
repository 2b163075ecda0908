"""`text/layers`: words of captions after the text tower's last blocks, asked for later, kept, mended and merged."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import zarr

from s4v.backbone.open_clip_models import list_models
from s4v.backbone.text_tower import count_text_words, describe_text_tower, load_text_tower
from s4v.errors import BackboneError, ConfigError, StoreDamagedError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.store import texts as texts_module
from s4v.store.info import describe_store, render_info
from s4v.store.merge import merge_stores
from s4v.store.names import is_known
from s4v.store.reader import open_store
from s4v.store.text_choice import TextChoice, read_text_choice
from s4v.store.texts import TextReader, has_current_texts, write_texts
from s4v.store.verify import verify_store
from s4v.train.clips import ClipLoader, ClipPlan

CPU = torch.device("cpu")
TEXTS = ["a red ring moves left", "!! an odd one, !!! is it?", "a long " * 60, "x"]
PASS = 64
"""Texts in one pass of a store's text tower."""

SMALL = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 5},
}
"""A tower of CLIP's kind with random weights."""


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """Names of open_clip's models, and files of their weights: as plain CLIP has them, and below `text.` as EVA."""
    folder = tmp_path_factory.mktemp("models")
    list_models()  # which adds tiny-clip
    configs = {"block-clip": SMALL, "block-custom": {**SMALL, "custom_text": True}}
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    found = {}
    for seed, name in enumerate(("tiny-clip", *configs)):
        torch.manual_seed(seed)
        model = open_clip.create_model(name, output_dict=False).eval()
        torch.save(model.state_dict(), folder / f"{name}.pt")
        found[name] = model, folder / f"{name}.pt"
    return found


def run_live(name, model, num_words):
    """The raw outputs of all blocks of open_clip's own model, (n, blocks, words, Dt), from a pass of a store's size."""
    tokens = open_clip.get_tokenizer(name)(TEXTS, context_length=num_words)
    whole = torch.zeros(PASS, model.context_length, dtype=tokens.dtype)
    whole[: len(TEXTS), :num_words] = tokens
    tower = getattr(model, "text", model)
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: seen.append(output)) for block in tower.transformer.resblocks
    ]
    with torch.inference_mode():
        model.encode_text(whole)
    for hook in hooks:
        hook.remove()
    ends = tokens.argmax(dim=1)
    return torch.stack(seen, dim=1)[: len(TEXTS), :, :num_words], ends


@pytest.mark.parametrize("name", ["tiny-clip", "block-clip", "block-custom"])
def test_words_of_blocks_are_those_of_the_tower_run_live(small_models, name):
    model, weights = small_models[name]
    tower = load_text_tower(name, weights=str(weights), device=CPU)
    info = describe_text_tower(name)
    num_words, blocks = min(30, info.context_length), range(info.depth)
    live, ends = run_live(name, model, num_words)
    texts = tower.encode_words(TEXTS, num_words, blocks=blocks)
    is_word = torch.arange(num_words) <= ends[:, None]
    assert torch.equal(torch.from_numpy(texts.mask), is_word)
    assert texts.layers.shape == (len(TEXTS), info.depth, num_words, info.width)
    assert texts.layers.dtype == np.float16
    expected = torch.where(is_word[:, None, :, None], live, 0).half()
    np.testing.assert_array_equal(texts.layers, expected.numpy())
    end = getattr(model, "text", model)
    with torch.inference_mode():
        words = end.ln_final(live[:, -1]) @ end.text_projection * is_word[..., None]
    np.testing.assert_allclose(texts.tokens, words.numpy(), rtol=2e-3, atol=2e-3)
    some = tower.encode_words(TEXTS, num_words, blocks=[1])
    np.testing.assert_array_equal(some.layers[:, 0], texts.layers[:, 1])
    plain = tower.encode_words(TEXTS, num_words)
    assert plain.layers is None
    for one, other in zip(plain.arrays[:3], texts.arrays[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    assert tower.count_words(TEXTS, num_words).tolist() == is_word.sum(dim=1).tolist()
    assert count_text_words(name, TEXTS, num_words).tolist() == is_word.sum(dim=1).tolist()
    assert tower.count_words([], num_words).shape == (0,)


def test_float32_of_blocks_is_that_of_the_tower_run_live(small_models, monkeypatch):
    """To the bit, before it is rounded."""
    model, weights = small_models["block-clip"]
    tower = load_text_tower("block-clip", weights=str(weights), device=CPU)
    live, ends = run_live("block-clip", model, 30)
    monkeypatch.setattr(torch.Tensor, "half", lambda values: values)
    layers = tower.encode_words(TEXTS, 30, blocks=range(5)).layers
    assert layers.dtype == np.float32
    is_word = (torch.arange(30) <= ends[:, None]).numpy()
    np.testing.assert_array_equal(layers.swapaxes(1, 2)[is_word], live.numpy().swapaxes(1, 2)[is_word])


def test_a_block_that_overflows_is_named(small_models, tmp_path):
    _, weights = small_models["block-clip"]
    state = torch.load(weights)
    state["transformer.resblocks.3.mlp.c_proj.bias"] += 1e5
    torch.save(state, tmp_path / "large.pt")
    tower = load_text_tower("block-clip", weights=str(tmp_path / "large.pt"), device=CPU)
    assert np.isfinite(tower.encode_words(TEXTS, 9, blocks=[1, 2]).layers).all()
    with pytest.raises(BackboneError, match="what block 3 of the text tower gives does not fit float16"):
        tower.encode_words(TEXTS, 9, blocks=[2, 3, 4])


def test_towers_that_are_not_clips_are_refused():
    with pytest.raises(BackboneError, match=r"ViT-B-16-SigLIP: this text tower is not like CLIP's"):
        describe_text_tower("ViT-B-16-SigLIP")
    tower = load_text_tower("tiny-clip", weights="random", device=CPU)
    with pytest.raises(BackboneError, match=r"has blocks 0 to 2; found \[2, 3\]"):
        tower.encode_words(["x"], 28, blocks=[2, 3])


@pytest.fixture(scope="module")
def tower():
    return load_text_tower("tiny-clip", weights="random:0", device=CPU)


@pytest.fixture
def config(captioned_folder, captioned_store, make_captioned_config, tmp_path):
    """The extraction of a finished store, which it may change."""
    return make_captioned_config(captioned_folder, shutil.copytree(captioned_store, tmp_path / "s.zarr"))


@pytest.mark.slow  # four commands
def test_a_finished_store_gets_layers_and_keeps_them(config, captioned_store, contents, tower):
    before, captions = contents(config.out), open_store(config.out).read_captions()["text"].to_pylist()
    extract_dataset(replace(config, text_layers="last2"))
    store = open_store(config.out)
    reader = TextReader(store)
    assert reader.choice == TextChoice(layers=(1, 2), width=128)
    expected = tower.encode_words(captions, 28, blocks=[1, 2])
    found = reader.read(range(len(captions)), reader.choice.arrays)
    for ours, theirs in zip(found.arrays, expected.arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    plain = zarr.open_group(config.out, mode="r")["text"]
    assert dict(plain.attrs)["text_layers"] == [1, 2] and dict(plain.attrs)["text_width"] == 128
    np.testing.assert_array_equal(plain["layers"][:], found.layers)
    assert plain["layers"].chunks == (1, 2, 28, 128)
    after = contents(config.out)
    changed = {name for name, data in before.items() if after[name] != data}
    assert changed == {"text/zarr.json"}, "words, masks and embeddings are the bytes that they were"
    assert set(after) - set(before) == {"text/layers/zarr.json", "text/layers/c.0.0.0.0"}
    assert verify_store(store) == []
    assert describe_store(store)["arrays"]["text/layers"]["blocks"] == [1, 2]
    assert any(
        "text/layers" in line and "blocks 1,2 of the text tower" in line for line in render_info(describe_store(store))
    )
    extract_dataset(config)
    extract_dataset(replace(config, text_layers="1"))
    assert contents(config.out) == after, "what is there is kept, and more blocks than are asked for"
    assert not list(config.out.glob(".text.*"))


def test_padding_takes_nothing(config):
    extract_dataset(replace(config, text_layers="3"))
    store = open_store(config.out)
    words = int(TextReader(store).read(range(19), ("mask",)).mask.sum())
    size = (config.out / "text/layers/c.0.0.0.0").stat().st_size - 16 * 1024
    assert size < 1.05 * words * 3 * 128 * 2 + 19 * 400


@pytest.mark.slow
def test_as_many_words_as_the_longest_caption_has(config, tower):
    captions = open_store(config.out).read_captions()["text"].to_pylist()
    longest = int(tower.count_words(captions, 28).max())
    assert 10 < longest < 28
    before = TextReader(open_store(config.out)).read(range(19))
    extract_dataset(replace(config, text_words=77, text_layers="last1"))
    reader = TextReader(open_store(config.out))
    assert reader.num_words == longest and reader.choice.num_words == 77
    found = reader.read(range(19), reader.choice.arrays)
    np.testing.assert_array_equal(found.tokens, before.tokens[:, :longest])
    np.testing.assert_array_equal(found.embedding, before.embedding)
    extract_dataset(replace(config, text_words=10))
    reader = TextReader(open_store(config.out))
    assert reader.num_words == 10 and reader.choice.layers == (2,)
    assert reader.read(range(19), ("mask",)).mask.sum(axis=1).max() == 10


@pytest.mark.slow  # as captions are
def test_damaged_layers_are_found_and_mended(config, contents, flip_byte):
    """By a command that does not ask for them."""
    extract_dataset(replace(config, text_layers="last2"))
    whole = contents(config.out)
    flip_byte(config.out / "text/layers/c.0.0.0.0", 200)
    assert [one.where for one in verify_store(open_store(config.out))] == ["text/layers/c.0.0.0.0"]
    with pytest.raises(StoreDamagedError, match=r"text/layers is damaged.*--repair"):
        TextReader(open_store(config.out)).read(range(19), ("layers",))
    extract_dataset(replace(config, repair=True))
    assert verify_store(open_store(config.out)) == []
    assert contents(config.out) == whole
    (config.out / "text/layers/zarr.json").unlink()
    assert "text/layers/zarr.json" in {one.where for one in verify_store(open_store(config.out))}
    extract_dataset(replace(config, repair=True))
    assert contents(config.out) == whole


@pytest.mark.slow
def test_what_was_asked_for_is_told_to_be_lost_with_its_record(config, flip_byte, caplog):
    extract_dataset(replace(config, text_layers="last2"))
    flip_byte(config.out / "text/zarr.json", 80)
    extract_dataset(replace(config, repair=True))
    assert "which blocks of the text tower it keeps (--text-layers) was damaged and is lost" in caplog.text
    assert TextReader(open_store(config.out)).choice == TextChoice()
    assert verify_store(open_store(config.out)) == []


@pytest.mark.parametrize("value", ["[1, 1]", "[]", '"x"', "[-1]", "[2, 1]", "[true]", "[99999999999]", "null", "[1]"])
def test_records_that_cannot_be_end_in_one_line(config, value):
    file = config.out / "text/zarr.json"
    group = json.loads(file.read_text())
    width = 128 if value != "[1]" else "wide"
    group["attributes"] |= {"text_layers": json.loads(value), "text_width": width}
    file.write_text(json.dumps(group))
    with pytest.raises(StoreDamagedError, match=r"text/zarr.json cannot be: text_(layers|width)"):
        TextReader(open_store(config.out))
    assert {"text/zarr.json"} == {one.where for one in verify_store(open_store(config.out))}


def test_layers_that_the_group_does_not_record_are_none(config):
    extract_dataset(replace(config, text_layers="last2"))
    file = config.out / "text/zarr.json"
    group = json.loads(file.read_text())
    del group["attributes"]["text_layers"], group["attributes"]["text_width"]
    file.write_text(json.dumps(group))
    with pytest.raises(StoreMismatchError, match=r"has no layers: .*--text-layers last4, which adds them"):
        TextReader(open_store(config.out)).read([0], ("layers",))
    assert is_known("text/layers/c.0.0.0.0") and not is_known("text/layers/c.0") and not is_known("text/words/c.0.0")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize(
    "point",
    [
        "shard of texts written",
        "texts moved",
        *(pytest.param(f"texts {state}", marks=pytest.mark.slow) for state in ("written", "void", "away")),
    ],
)
def test_layers_that_were_killed_are_completed(config, tower, contents, monkeypatch, tmp_path, point):
    undisturbed = open_store(shutil.copytree(config.out, tmp_path / "undisturbed.zarr"))
    choice = TextChoice(layers=(1, 2), width=128)
    encode = lambda texts: tower.encode_words(texts, 28, blocks=choice.layers)  # noqa: E731
    write_texts(undisturbed, encode, num_words=28, choice=choice)
    store = open_store(config.out)

    def stop(name):
        if name == point:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(texts_module, "kill_point", stop)
        with pytest.raises(Killed):
            write_texts(store, encode, num_words=28, choice=choice)
    is_replaced = point not in ("shard of texts written", "texts written")
    assert has_current_texts(store.path) != is_replaced
    if is_replaced:
        assert read_text_choice(store.path) == choice, "what was asked for stands recorded"
        extract_dataset(config)  # which does not ask again
    else:
        assert TextReader(store).choice == TextChoice(), "the old ones are there"
        extract_dataset(replace(config, text_layers="last2"))
    assert contents(config.out) == contents(undisturbed.path)
    assert verify_store(open_store(config.out)) == []
    assert not list(config.out.glob(".*.partial"))


def test_what_nobody_asks_for_any_more_goes(config, tower, contents, monkeypatch):
    before = contents(config.out)
    with monkeypatch.context() as patch:
        patch.setattr(texts_module, "kill_point", lambda name: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            encode = lambda texts: tower.encode_words(texts, 28, blocks=[2])  # noqa: E731
            write_texts(open_store(config.out), encode, num_words=28, choice=TextChoice(layers=(2,), width=128))
    assert list(config.out.glob(".text.*"))
    extract_dataset(config)
    assert not list(config.out.glob(".text.*")) and contents(config.out) == before


@pytest.mark.slow
def test_layers_follow_captions_that_are_added(captioned_folder, make_captioned_config, make_video, config, tmp_path):
    root = shutil.copytree(captioned_folder, tmp_path / "videos")
    extract_dataset(replace(config, text_layers="last2"))
    before = TextReader(open_store(config.out)).read(range(19), ("layers",))
    make_video(root / "99.mp4", seed=99)
    with (root / "videos.csv").open("a") as file:
        file.write("99.mp4,val,a green star grows\n")
    extract_dataset(make_captioned_config(root, config.out, append=True))
    reader = TextReader(open_store(config.out))
    assert len(reader) == 20 and reader.choice.layers == (1, 2)
    np.testing.assert_array_equal(reader.read(range(19), ("layers",)).layers, before.layers)
    assert verify_store(open_store(config.out)) == []


@pytest.mark.slow  # three extractions
def test_parts_are_merged_with_their_layers(config, tmp_path):
    extract_dataset(replace(config, text_layers="last2", class_template=None))
    merge_stores([config.out], tmp_path / "merged.zarr")
    ours, theirs = (TextReader(open_store(path)) for path in (tmp_path / "merged.zarr", config.out))
    np.testing.assert_array_equal(*(one.read(range(19), ("layers",)).layers for one in (ours, theirs)))
    assert verify_store(open_store(tmp_path / "merged.zarr")) == []


def test_a_batch_is_padded_to_its_longest_text(config):
    reads = dict(arrays=("cls",), layers=range(6), device=CPU, text_arrays=("mask", "layers"))
    with pytest.raises(StoreMismatchError, match="has no layers: .*--text-layers last4, which adds them"):
        ClipLoader(open_store(config.out), **reads)
    extract_dataset(replace(config, text_layers="last2"))
    store = open_store(config.out)
    whole = TextReader(store).read(range(19), ("mask", "layers"))
    counts = whole.mask.sum(axis=1)
    captions = np.argsort(counts, kind="stable")[[0, 3, 5]]
    loader = ClipLoader(store, **reads)
    plan = ClipPlan(np.zeros(3, np.int64), np.zeros(3, np.int64), np.zeros((3, 2), np.int64), captions)
    (batch,) = loader.load([plan])
    longest = counts[captions].max()
    assert longest < whole.mask.shape[1] and batch.texts.layers.dtype == torch.float32
    assert batch.texts.layers.shape == (3, 2, longest, 128) and batch.texts.mask.shape == (3, longest)
    np.testing.assert_array_equal(batch.texts.layers.numpy(), whole.layers[captions][:, :, :longest])
    assert batch.texts.tokens is None and any(one is batch.texts.layers for one in batch.tensors())


def test_what_cannot_be_kept_is_refused_before_anything_is_read(
    config, captioned_folder, video_folder, make_config, tmp_path, monkeypatch
):
    with pytest.raises(ConfigError, match=r"--text-layers last9: the text tower of tiny-clip has 3 blocks"):
        extract_dataset(replace(config, text_layers="last9"))
    with pytest.raises(ConfigError, match=r"--text-layers and --text-words keep words of captions, and no video of fo"):
        extract_dataset(make_config(video_folder, tmp_path / "x.zarr", text_layers="4", text_words=9))
    for bad in ("last0", "0", "paper", "", "last", "-1", "1,2"):
        with pytest.raises(ConfigError, match="--text-layers takes last4, or a number of blocks; found"):
            replace(config, text_layers=bad)
    with pytest.raises(ConfigError, match="so it must be at least 3; found 2"):
        replace(config, text_words=2)
    weights = tmp_path / "vision.pt"
    model = open_clip.create_model("tiny-clip")
    torch.save({name: one for name, one in model.state_dict().items() if name.startswith("visual.")}, weights)
    new = replace(config, out=tmp_path / "new.zarr", weights=str(weights), text_layers="last2")
    with pytest.raises(Exception, match=r"no text tower in these weights"):
        extract_dataset(new)
    assert not new.out.exists()


@pytest.mark.slow
def test_the_command_adds_layers_and_plan_tells_their_bytes(captioned_folder, config, tmp_path):
    command = [sys.executable, "-m", "s4v"]
    data = ["--model", "tiny-clip", "--dataset", "table", "--root", captioned_folder]
    data += ["--annotations", captioned_folder / "videos.csv", "--text-layers", "last2", "--text-words", "77"]
    plan = [*command, "plan", *data, "--device", "cpu", "--json"]
    sizes = json.loads(subprocess.run(plan, check=True, capture_output=True, env={**os.environ}).stdout)
    sizes = sizes["bytes_by_array"]
    extract_dataset(replace(config, text_layers="last2", text_words=77))
    reader = TextReader(open_store(config.out))
    texts = reader.read(range(19), reader.choice.arrays)
    # Random weights know every word, as the tokenizer does; those that come with tiny-clip know fewer.
    assert sizes["text/layers"] == int(texts.mask.sum()) * 2 * 128 * 2
    assert sizes["text"] == sum(texts.arrays[place].nbytes for place in range(3))
