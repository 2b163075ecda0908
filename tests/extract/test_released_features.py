"""Released features as a store: the tokens of a store of our own, written as R2-Tuning's files are, come back."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, DataNotFoundError, StoreMismatchError
from s4v.extract.extraction import extract_dataset
from s4v.extract.released_features import FeatureFolder, import_features, open_features
from s4v.store.reader import open_store
from s4v.store.texts import TextReader
from s4v.store.verify import verify_store

ROWS = [
    {"qid": 5, "query": "a ring moves", "vid": "00", "split": "train", "duration": 1.2, "relevant_windows": [[0, 0.5]]},
    {"qid": "x", "query": "a red cross that rises", "vid": "00", "split": "train", "relevant_windows": [[0.5, 1]]},
    {"qid": 6, "query": "a cross", "vid": "04", "split": "val", "relevant_windows": []},
]
OPTIONS = {"sampling": "fps:5", "frames": None, "layers": "last3", "text_layers": "last3", "with_pixels": False}


@pytest.fixture(scope="module")
def made(build_once, captioned_folder, make_captioned_config):
    """A float16 store, and its tokens as released files."""

    def make(root):
        (root / "moments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        config = make_captioned_config(
            captioned_folder,
            root / "own.zarr",
            annotations=root / "moments.jsonl",
            dtype="float16",
            text_words=77,
            **OPTIONS,
        )
        extract_dataset(config)
        write_features(open_store(config.out), root / "features")

    return build_once("released", make)


def write_features(store, folder):
    for row, facts in enumerate(store.read_manifest(["video_id", "num_cached_frames"]).to_pylist()):
        count = facts["num_cached_frames"]
        clips = store.read_clips([row], [list(range(count))])
        tokens = np.concatenate([clips.cls[0][:, :, None], clips.patches[0]], axis=2)
        save(folder / f"clip_b32_vid_k4/{facts['video_id']}.npy", tokens)
    texts = TextReader(store).read(range(len(ROWS)), ["layers", "mask"])
    for query_id, layers, mask in zip(store.read_moments().query_ids, texts.layers, texts.mask, strict=True):
        save(folder / f"clip_b32_txt_k4/{query_id}.npy", layers[:, mask].swapaxes(0, 1))


def save(file, values):
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, values.astype(np.float16))


@pytest.fixture
def config(made, captioned_folder, make_captioned_config, tmp_path):
    """Of an import; its root holds no video."""
    shutil.copytree(made / "features", tmp_path / "features")
    (tmp_path / "nothing").mkdir()
    return make_captioned_config(
        tmp_path / "nothing",
        tmp_path / "imported.zarr",
        annotations=made / "moments.jsonl",
        dtype="float16",
        text_words=77,
        **OPTIONS,
    )


def read_all(path):
    store = open_store(path)
    counts = store.read_manifest(["num_cached_frames"])["num_cached_frames"].to_pylist()
    return store, [store.read_clips([row], [list(range(count))]) for row, count in enumerate(counts)]


def test_tokens_words_and_moments_come_back(config, made, tmp_path):
    summary = import_features(config, tmp_path / "features")
    assert summary.videos == {"ok": 2, "failed": 0, "pending": 0}
    (own, ours), (store, theirs) = read_all(made / "own.zarr"), read_all(config.out)
    for mine, one in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.patches, mine.patches)
        np.testing.assert_array_equal(one.cls, mine.cls)
    for row in range(2):
        count = theirs[row].cls.shape[1]
        embeddings = [part.read_row(row, 1, count)["embedding"] for part in (own, store)]
        np.testing.assert_allclose(*embeddings, atol=2e-2, rtol=2e-2)
    arrays = ["tokens", "mask", "embedding", "layers"]
    texts = [TextReader(part).read(range(3), arrays) for part in (own, store)]
    for name in arrays:
        np.testing.assert_array_equal(getattr(texts[1], name), getattr(texts[0], name))
    assert list(store.read_moments()) == list(own.read_moments())
    assert store.layout.layers == own.layout.layers and verify_store(store) == []
    row = store.read_manifest().to_pylist()[0]
    np.testing.assert_allclose(row["timestamps_s"], [(place + 0.5) / 5 for place in range(6)])
    assert row["duration_s"] == 1.2 and row["eval_clips"] == [list(range(6))]


def test_released_words_go_before_the_text_towers(config, tmp_path):
    file = tmp_path / "features/clip_b32_txt_k4/6.npy"
    words = np.load(file)
    save(file, words + 1)
    import_features(config, tmp_path / "features")
    texts = TextReader(open_store(config.out)).read([2], ["layers", "mask"])
    np.testing.assert_array_equal(texts.layers[0][:, texts.mask[0]], (words + 1).swapaxes(0, 1))
    assert not texts.layers[0][:, ~texts.mask[0]].any()


def test_rows_without_files_fail_and_a_stopped_import_goes_on(config, tmp_path, monkeypatch):
    (tmp_path / "features/clip_b32_vid_k4/04.npy").unlink()
    (tmp_path / "features/clip_b32_txt_k4/5.npy").unlink()
    from s4v.extract import released_features

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(released_features, "_write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            import_features(config, tmp_path / "features")
    summary = import_features(config, tmp_path / "features")
    assert summary.videos == {"ok": 1, "failed": 1, "pending": 0}
    assert [one["reason"] for one in summary.failed] == ["missing-file: clip_b32_vid_k4/04.npy"]
    assert verify_store(open_store(config.out)) == []
    assert TextReader(open_store(config.out)).read([0], ["layers"]).layers.any(), "of the text tower"


def test_int8_has_a_codec_that_was_fitted_on_them(config, made, tmp_path):
    import_features(replace(config, dtype="int8", channels=16), tmp_path / "features")
    store, theirs = read_all(config.out)
    _, ours = read_all(made / "own.zarr")
    decoded = np.stack([store.codec.decode(theirs[0].patches[0][:, place], place) for place in range(3)], axis=1)
    expected = ours[0].patches[0].astype(np.float32)
    error = np.square(decoded - expected).mean() / expected.var()
    assert theirs[0].patches.dtype == np.int8 and error < 0.2


def test_what_does_not_fit_is_refused_before_anything_is_written(config, tmp_path, captioned_folder):
    features = tmp_path / "features"
    with pytest.raises(ConfigError, match="released features are at a fixed rate"):
        import_features(replace(config, sampling="uniform"), features)
    with pytest.raises(StoreMismatchError, match=r"00\.npy has float16 .*, expected floats \(n, 2, .*other --layers"):
        import_features(replace(config, layers="last2"), features)
    with pytest.raises(ConfigError, match="hold no pixels"):
        import_features(replace(config, with_pixels=True), features)
    with pytest.raises(DataNotFoundError, match=r"expected one folder clip_\*_vid_k\* in .*, found none"):
        import_features(config, tmp_path)
    bad = features / "clip_b32_vid_k4/00.npy"
    bad.write_bytes(b"no array")
    with pytest.raises(StoreMismatchError, match=r"00\.npy does not read as an array"):
        import_features(config, features)
    np.save(bad, np.float16(1))
    with pytest.raises(StoreMismatchError, match=r"00\.npy holds no array of frames or words"):
        open_features(bad, (3, 1, 1))
    assert not config.out.exists()
    (features / "clip_b16_vid_k4").mkdir()
    with pytest.raises(DataNotFoundError, match="found clip_b16_vid_k4, clip_b32_vid_k4"):
        FeatureFolder(features)


def test_an_extraction_does_not_go_on_with_it(config, tmp_path, captioned_folder):
    import_features(config, tmp_path / "features")
    with pytest.raises(StoreMismatchError, match="features R2-Tuning there, None here"):
        extract_dataset(replace(config, root=captioned_folder))


def test_the_command_says_what_was_made(config, made, tmp_path):
    words = ["import-features", tmp_path / "features", "--model", "tiny-clip", "--weights", config.weights or "random"]
    words += ["--dataset", "table", "--annotations", made / "moments.jsonl", "--root", tmp_path / "nothing"]
    words += ["--out", config.out, "--sampling", "fps:5", "--layers", "last3", "--text-layers", "last3"]
    words += ["--dtype", "float16", "--device", "cpu"]
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert f"{config.out}: 2 videos ok" in result.stdout.replace("\n", "")
    store = open_store(config.out)
    assert (
        store.layout.layers == (3, 4, 5)
        and not store.layout.with_pixels
        and store.attributes["features"] == "R2-Tuning"
    )
