import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from s4v.backbone.text_tower import load_text_tower
from s4v.errors import StoreDamagedError, StoreMismatchError, WeightsError
from s4v.extract import caption_texts
from s4v.extract.extraction import extract_dataset
from s4v.store import texts as texts_module
from s4v.store.info import describe_store
from s4v.store.lease import Scope, hold_lease
from s4v.store.reader import open_store
from s4v.store.texts import MAX_WORDS, TextReader, has_current_texts, remove_texts, write_texts
from s4v.store.verify import verify_store


@pytest.fixture(scope="module")
def tower():
    return load_text_tower("tiny-clip", weights="random:0", device=torch.device("cpu"))


def test_a_store_holds_its_captions_as_the_text_tower_has_them(captioned_store, tower):
    store = open_store(captioned_store)
    captions = store.read_captions()["text"].to_pylist()
    assert len(captions) == 19
    reader = TextReader(store)
    found = reader.read(range(len(captions)))
    assert found.tokens.shape == (19, 28, 128) and found.tokens.dtype == np.float16
    assert found.mask.dtype == bool and found.embedding.dtype == np.float32
    np.testing.assert_allclose(found.embedding, tower.encode(captions), rtol=1e-4, atol=1e-5)
    ends = found.mask.sum(axis=1) - 1
    np.testing.assert_allclose(found.tokens[np.arange(19), ends], found.embedding, rtol=1e-3, atol=1e-3)
    assert (found.tokens[~found.mask] == 0).all()
    plain = zarr.open_group(captioned_store, mode="r")["text"]
    np.testing.assert_array_equal(plain["embedding"][:], found.embedding)
    np.testing.assert_array_equal(plain["tokens"][:], found.tokens)
    np.testing.assert_array_equal(plain["mask"][:], found.mask)
    assert describe_store(store)["arrays"]["text/tokens"]["shape"] == [19, 28, 128]


@pytest.mark.slow
def test_words_are_those_of_open_clip():
    """A text tower of the usual size, cut at 32 words: its own tokens, and those of open_clip's model."""
    name, texts = "ViT-B-32-quickgelu", ["a red ring moves left", "!! an odd one, !!! is it?", "a long " * 60]
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None, output_dict=False).eval()
    ours = load_text_tower("vit-b32", weights="random", device=torch.device("cpu"))
    ours._tower.load_state_dict({k: v for k, v in model.state_dict().items() if k in ours._tower.state_dict()})
    tokens = open_clip.get_tokenizer(name)(texts, context_length=MAX_WORDS)
    seen = []
    model.ln_final.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.inference_mode():
        expected = model.encode_text(torch.nn.functional.pad(tokens, (0, 77 - MAX_WORDS)))
        words = (seen[0] @ model.text_projection)[:, :MAX_WORDS]
    found = ours.encode_words(texts, MAX_WORDS)
    assert found.mask.sum(axis=1).tolist() == [7, int(tokens[1].argmax()) + 1, MAX_WORDS]
    np.testing.assert_allclose(found.embedding, expected, rtol=1e-4, atol=1e-4)
    words = words.numpy() * found.mask[..., None]
    np.testing.assert_allclose(found.tokens, words, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def reader(captioned_store):
    return TextReader(open_store(captioned_store))


@given(rows=st.lists(st.integers(0, 18), max_size=30), names=st.sets(st.sampled_from(["tokens", "mask", "embedding"])))
def test_any_captions_are_read_in_the_order_asked_for(reader, rows, names):
    whole, found = reader.read(range(19)), reader.read(rows, tuple(names))
    for name in ("tokens", "mask", "embedding"):
        values = getattr(found, name)
        if name in names:
            np.testing.assert_array_equal(values, getattr(whole, name)[rows])
        else:
            assert values is None


def test_texts_of_many_shards_are_the_same(
    captioned_folder, captioned_store, make_captioned_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(texts_module, "TEXTS_PER_SHARD", 4)
    out = tmp_path / "shards.zarr"
    extract_dataset(make_captioned_config(captioned_folder, out))
    found, whole = (TextReader(open_store(path)).read(range(19)) for path in (out, captioned_store))
    for name in ("tokens", "mask", "embedding"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert len(list((out / "text/tokens").glob("c.*"))) == 5
    assert verify_store(open_store(out)) == []


def test_damage_is_found_and_mended(
    captioned_folder, captioned_store, make_captioned_config, tmp_path, flip_byte, contents
):
    damaged = shutil.copytree(captioned_store, tmp_path / "copy.zarr")
    files = ["text/tokens/c.0.0.0", "text/mask/c.0.0", "text/embedding/c.0.0", "text/mask/zarr.json"]
    for name in files[:3]:
        flip_byte(damaged / name, 200)
    assert {one.where for one in verify_store(open_store(damaged))} == set(files[:3])
    flip_byte(damaged / files[3], 200)
    assert {one.where for one in verify_store(open_store(damaged))} >= {files[0], files[2], files[3]}
    with pytest.raises(StoreDamagedError, match=r"text/mask is damaged.*--repair"):
        texts = TextReader(open_store(shutil.copytree(captioned_store, tmp_path / "other.zarr")))
        flip_byte(tmp_path / "other.zarr/text/mask/c.0.0")
        texts.read(range(19))
    (tmp_path / "other.zarr/text/embedding/c.0.0").unlink()
    with pytest.raises(StoreDamagedError, match=r"text/embedding has lost the text 3"):
        texts.read([3], ("embedding",))
    extract_dataset(make_captioned_config(captioned_folder, damaged, repair=True))
    assert verify_store(open_store(damaged)) == []
    assert contents(damaged) == contents(captioned_store)


def test_texts_follow_captions_that_are_added(captioned_folder, make_captioned_config, make_video, tmp_path):
    root = shutil.copytree(captioned_folder, tmp_path / "videos")
    config = make_captioned_config(root, tmp_path / "grown.zarr")
    extract_dataset(config)
    before = TextReader(open_store(config.out)).read(range(19))
    make_video(root / "99.mp4", seed=99)
    with (root / "videos.csv").open("a") as file:
        file.write("99.mp4,val,a green star grows\n")
    extract_dataset(make_captioned_config(root, config.out, append=True))
    after = TextReader(open_store(config.out))
    assert len(after) == 20
    np.testing.assert_array_equal(after.read(range(19)).tokens, before.tokens)
    assert verify_store(open_store(config.out)) == []


def test_an_interrupted_run_leaves_no_half_texts(
    captioned_folder, captioned_store, make_captioned_config, tmp_path, monkeypatch, contents
):
    config = make_captioned_config(captioned_folder, tmp_path / "store.zarr")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("s4v.backbone.open_clip_texts.OpenClipTextTower.encode_words", stop)
        with pytest.raises(KeyboardInterrupt):
            extract_dataset(config)
    assert not has_current_texts(config.out)
    assert verify_store(open_store(config.out)) == []
    with pytest.raises(StoreMismatchError, match="holds no texts of its captions"):
        TextReader(open_store(config.out))
    extract_dataset(config)
    assert contents(config.out, "zarr.json") == contents(captioned_store, "zarr.json"), "but for the time of its making"
    assert not list(config.out.glob(".text.*"))


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def bare_store(captioned_store, tmp_path):
    """A store that has its captions and no texts of them."""
    path = shutil.copytree(captioned_store, tmp_path / "bare.zarr")
    with hold_lease(path, Scope.manifest(), purpose="test") as lease:
        remove_texts(path, lease)
    return open_store(path)


def find_partial(store):
    """Where texts are that are not whole yet."""
    [partial] = store.path.glob(".text.*.partial/text")
    return partial


def write_some(store, tower, monkeypatch, *, until=None, num_words=28):
    """Write texts in shards of four, and be killed after so many of them; how many texts the tower was given."""
    asked, passed = [], []

    def encode(texts):
        asked.extend(texts)
        return tower.encode_words(texts, num_words)

    def pass_by(name):
        passed.append(name)
        if name.startswith("shard") and passed.count(name) == until:
            raise Killed

    monkeypatch.setattr(texts_module, "TEXTS_PER_SHARD", 4)
    monkeypatch.setattr(texts_module, "kill_point", pass_by)
    try:
        write_texts(store, encode, num_words=num_words)
    except Killed:
        assert until is not None
    return len(asked)


@pytest.mark.parametrize("done", [1, 3, 5])
def test_texts_go_on_where_they_were_killed(bare_store, tower, monkeypatch, contents, tmp_path, done):
    undisturbed = open_store(shutil.copytree(bare_store.path, tmp_path / "undisturbed.zarr"))
    assert write_some(undisturbed, tower, monkeypatch) == 19
    assert write_some(bare_store, tower, monkeypatch, until=done) == min(4 * done, 19)
    assert not has_current_texts(bare_store.path)
    (find_partial(bare_store) / "tokens/c.4.0.0.__lock").write_bytes(b"half")
    assert write_some(bare_store, tower, monkeypatch) == 19 - min(4 * done, 19)
    assert contents(bare_store.path) == contents(undisturbed.path)
    assert has_current_texts(bare_store.path)


def test_shards_that_are_not_whole_are_done_again(bare_store, tower, monkeypatch, contents, flip_byte, tmp_path):
    undisturbed = open_store(shutil.copytree(bare_store.path, tmp_path / "undisturbed.zarr"))
    write_some(undisturbed, tower, monkeypatch)
    write_some(bare_store, tower, monkeypatch, until=4)
    partial = find_partial(bare_store)
    flip_byte(partial / "tokens/c.0.0.0")
    (partial / "mask/c.1.0").unlink()
    cut = partial / "embedding/c.2.0"
    cut.write_bytes(cut.read_bytes()[:-9])
    assert write_some(bare_store, tower, monkeypatch) == 19 - 4, "the fourth is whole"
    assert contents(bare_store.path) == contents(undisturbed.path)


def test_what_is_of_other_captions_or_sizes_is_begun_anew(bare_store, tower, monkeypatch):
    write_some(bare_store, tower, monkeypatch, until=2, num_words=20)
    assert write_some(bare_store, tower, monkeypatch, until=2) == 8
    partial = find_partial(bare_store) / "zarr.json"
    partial.write_text(partial.read_text().replace('"captions_sha256": "', '"captions_sha256": "0'))
    assert write_some(bare_store, tower, monkeypatch, until=2) == 8
    (find_partial(bare_store) / "mask/zarr.json").unlink()
    assert write_some(bare_store, tower, monkeypatch) == 19
    assert TextReader(bare_store).num_words == 28


def test_without_a_text_tower_the_frames_are_there_all_the_same(
    captioned_folder, make_captioned_config, tmp_path, monkeypatch, caplog
):
    def lack(*_, **__):
        raise WeightsError("no text tower in this file")

    monkeypatch.setattr(caption_texts, "load_text_tower", lack)
    summary = extract_dataset(make_captioned_config(captioned_folder, tmp_path / "store.zarr"))
    assert summary.videos["ok"] == 12
    assert "its captions cannot train retrieval, for lack of a text tower: no text tower in this file" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("point", ["shard of texts written 1", "texts written 1", "texts in place 1"])
def test_a_run_killed_between_texts_is_completed(point, captioned_folder, captioned_store, contents, tmp_path):
    out = tmp_path / "killed.zarr"
    command = [
        sys.executable,
        "-m",
        "s4v",
        "extract",
        "--model",
        "tiny-clip",
        "--weights",
        "random",
        "--dataset",
        "table",
    ]
    command += [
        "--root",
        str(captioned_folder),
        "--annotations",
        str(captioned_folder / "videos.csv"),
        "--out",
        str(out),
    ]
    command += ["--frames", "train=6,4", "--dtype", "float32", "--device", "cpu", "--decoders", "2", "--resize", "224"]
    killed = subprocess.run(command, env={**os.environ, "S4V_KILL_AT": point}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True)
    assert contents(out, "zarr.json") == contents(captioned_store, "zarr.json")
    assert verify_store(open_store(out)) == []
    assert not list(out.glob(".text.*"))
