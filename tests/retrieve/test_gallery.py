import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageColor

from s4v.extract.extraction import extract_dataset
from s4v.pages import OUTLINE
from s4v.retrieve.gallery import choose_frames, write_gallery
from s4v.retrieve.search import Searcher
from s4v.store.reader import open_store


@pytest.mark.parametrize(
    ("num_frames", "moment", "expected"),
    [
        (12, (3.0, 5.0), ([2, 3, 4, 5, 6], [3, 4, 5])),
        (12, (0.0, 0.5), ([0, 1], [0])),
        (12, (10.5, 11.0), ([10, 11], [11])),
        (4, (0.0, 3.0), ([0, 1, 2, 3], [0, 1, 2, 3])),
        (100, (20.0, 60.0), ([19, 25, 31, 37, 43, 49, 55, 61], [25, 31, 37, 43, 49, 55])),
        (3, (None, None), ([0, 1, 2], [])),
        (22, (None, None), ([0, 3, 6, 9, 12, 15, 18, 21], [])),
        (1, (0.0, 9.0), ([0], [0])),
    ],
)
def test_a_strip_is_around_the_moment(num_frames, moment, expected):
    assert choose_frames([float(place) for place in range(num_frames)], *moment) == expected


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_video, make_config):
    root = tmp_path_factory.mktemp("gallery")
    make_video(root / "videos/long.mp4", num_frames=120)
    config = make_config(root / "videos", root / "s.zarr", frames={"": 24})
    extract_dataset(config)
    return open_store(config.out)


def read_strips(page):
    found = re.findall(r"data:image/png;base64,([^']+)'", page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def test_frames_of_the_moment_are_outlined_and_no_others(store, tmp_path):
    with Searcher(store) as searcher:
        (answer,) = searcher.find_text("a bright column")
    times = store.read_manifest(["timestamps_s"])["timestamps_s"][0].as_py()
    answer = replace(answer, start_s=(times[4] + times[5]) / 2, end_s=(times[7] + times[8]) / 2)
    write_gallery(tmp_path / "page.html", store, {"a query": [answer]})
    (strip,) = read_strips(tmp_path / "page.html")
    pixels = store.read_clips([0], [[4, 5, 6, 7, 8]], arrays=("pixels",)).pixels[0, :, 0]
    size = len(pixels[0])
    assert strip.shape == (size, 5 * size, 3), "three frames of the moment and one on each side, of 24"
    shown = np.split(strip, 5, axis=1)
    for place, frame in enumerate(shown):
        edge = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
        is_outlined = (edge == ImageColor.getrgb(OUTLINE)).all()
        assert is_outlined == (0 < place < 4)
        inside = slice(size // 4, -size // 4)
        np.testing.assert_array_equal(frame[inside, inside], pixels[place][inside, inside])
    assert "(outlined: the moment)" in (tmp_path / "page.html").read_text()


def test_texts_are_escaped_and_nothing_found_is_told(store, tmp_path):
    with Searcher(store) as searcher:
        (answer,) = searcher.find_text("anything")
    wrong = "<script>alert('x')</script>"
    write_gallery(tmp_path / "page.html", store, {wrong: [replace(answer, path=f"{wrong}.mp4")], "none": []})
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") == 2
    assert "<p>Nothing.</p>" in text
