"""Names are texts, on a terminal, in a log, on a page and in a plot, whatever characters they hold."""

import io
import json
import logging
import re
import sys
import warnings

import numpy as np
import pytest
from matplotlib import pyplot as plt
from typer.testing import CliRunner

from s4v.cli import app, main
from s4v.extract.extraction import extract_dataset
from s4v.pages import draw_confusion, draw_table, render_figure, write_page
from s4v.retrieve.gallery import write_gallery
from s4v.retrieve.search import Searcher
from s4v.store.reader import open_store

EXTRACT = ["extract", "--model", "tiny-clip", "--weights", "random", "--device", "cpu", "--decoders", "1"]
EXTRACT += ["--frames", "2", "--dtype", "float32"]
ODD = "a\x1b[31mred\nb\u202egnp.\x07"
SHOWN = r"a\x1b[31mred\nb\u202egnp.\x07"


def run(*arguments, charset="utf-8"):
    return CliRunner(charset=charset).invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, 5 % of it", "plain text, 5 % of it"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("two\nlines\r\tof one", r"two\nlines\r\tof one"),
        ("exe.\u202egpj\u2066x\u200f", r"exe.\u202egpj\u2066x\u200f"),
        ("\x9b31m\x00\x7f", r"\x9b31m\x00\x7f"),
        ("\u2028\u2029\ufeff", r"\u2028\u2029\ufeff"),
        ("caf\udce9.mp4", r"caf\xe9.mp4"),
        ("\ud83d", r"\ud83d"),
        ("\U000e0041", r"\U000e0041"),
        ("größer 猫 👩‍👧 می‌خواهم", "größer 猫 👩‍👧 می‌خواهم"),
        ("[red]no markup[/]", "[red]no markup[/]"),
    ],
)
def test_what_would_act_on_a_terminal_shows_instead(text, shown):
    """C6."""
    from s4v.terminal import make_visible

    assert make_visible(text) == shown


@pytest.fixture
def odd_folder(tmp_path, make_video):
    """A good video and one that is none, of names that would act on a terminal."""
    make_video(tmp_path / "v/train" / ODD / "good.mp4", num_frames=6)
    (tmp_path / "v/train" / ODD / f"bad{ODD}.mp4").write_bytes(b"not a video" * 20)
    return tmp_path / "v"


def test_names_on_stdout_and_stderr_are_single_visible_lines(odd_folder, tmp_path):
    """C6: extract, scan, verify, retrieve."""
    data = ["--dataset", "folder", "--root", odd_folder]
    made = run(*EXTRACT, *data, "--out", tmp_path / "s.zarr")
    assert "1 videos ok, 1 failed" in made.stdout, made.output
    results = [made, run("scan", *data, "--out", tmp_path / "scan.parquet", "--decoders", "1")]
    results += [run("retrieve", "--features", tmp_path / "s.zarr", "--query", "anything")]
    results += [run("retrieve", "--features", tmp_path / "s.zarr", "--like", f"no {ODD}")]
    for result in results:
        assert not re.search("[\x1b\x07\u202e]", result.output)
        assert SHOWN in result.output
    assert any(f"bad{SHOWN}.mp4: unreadable" in line for line in made.stdout.splitlines())
    (file,) = (tmp_path / "s.zarr/patches").glob("c.*")
    file.write_bytes(file.read_bytes()[:-5])
    damaged = run("verify", tmp_path / "s.zarr")
    assert damaged.exit_code == 4 and f"(video train/{SHOWN}/good.mp4)" in damaged.stdout


def test_json_is_one_line_of_ascii_and_holds_the_name_as_it_is(odd_folder, tmp_path):
    """C6."""
    made = run(*EXTRACT, "--dataset", "folder", "--root", odd_folder, "--out", tmp_path / "s.zarr", "--json")
    assert made.stdout.isascii() and made.stdout.count("\n") == 1
    assert json.loads(made.stdout)["failed"][0]["video_id"] == f"train/{ODD}/bad{ODD}.mp4"


def test_an_error_is_one_line_whatever_it_names(tmp_path):
    """C6: a path that does not exist, a value that is refused."""
    for arguments in (["info", tmp_path / ODD], [*EXTRACT, "--dataset", f"k{ODD}"], ["eval", "--run", tmp_path / ODD]):
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1 and "\x1b" not in result.stderr and r"\x1b[31m" in result.stderr


@pytest.mark.parametrize("name", ["größer", "猫", "😀"])
@pytest.mark.parametrize("charset", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_an_encoding_that_lacks_a_letter_gets_it_spelled_out(make_video, tmp_path, name, charset):
    """C6: PYTHONIOENCODING=ascii, or a C locale."""
    make_video(tmp_path / f"v/{name}.mp4", num_frames=6)
    (tmp_path / f"v/{name}-broken.mp4").write_bytes(b"no" * 50)
    found = run("scan", "--dataset", "folder", "--root", tmp_path / "v", "--out", tmp_path / "t", charset=charset)
    spelled = name.encode(charset, "backslashreplace").decode(charset)
    assert found.exception is None
    assert f"  {spelled}-broken.mp4: unreadable" in found.stdout


def test_main_sets_up_streams_and_log(monkeypatch):
    """C6: what other libraries print does not end in a UnicodeEncodeError, and warnings show what they hold."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["s4v", "--help"])
    monkeypatch.setattr(logging.root, "handlers", [])
    with pytest.raises(SystemExit) as ended:
        main()
    logging.getLogger("s4v.anything").warning("%s is new", f"größer{ODD}")
    told = raw.getvalue().decode()
    assert ended.value.code == 0
    assert told == f"WARNING: gr\\xf6\\xdfer{SHOWN} is new\n"


def test_a_traceback_in_the_log_keeps_its_lines():
    """C6."""
    from s4v.terminal import VisibleFormatter

    try:
        raise ValueError(ODD)
    except ValueError:
        record = logging.LogRecord("s4v", logging.ERROR, "", 0, "no %s", (ODD,), sys.exc_info())
    lines = VisibleFormatter("%(levelname)s: %(message)s").format(record).splitlines()
    assert lines[0] == f"ERROR: no {SHOWN}" and lines[1].startswith("Traceback")
    assert not any("\x1b" in line for line in lines)


def test_lines_go_to_whatever_stream_there_is():
    """C6."""
    from s4v.terminal import print_lines, quote

    stream = io.StringIO()
    print_lines("a\nb", 5, to=stream)
    assert stream.getvalue() == "a\\nb\n5\n"
    assert quote("x" * 200).endswith("xxx...'") and quote("a\nb") == r"'a\nb'"


FORMULAS = [r"pay $\frac{$ now", "$x_$ and $y^$", r"\$5 or $6", "$$", r"a$b\$c$", "%_^{}#&~\\", "_hidden"]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_class_in_a_plot_is_no_formula(name):
    """C6."""
    figure, axes = plt.subplots(figsize=(2, 2))
    draw_confusion(axes, np.eye(2, dtype=int), [name, "other"])
    try:
        png = render_figure(figure)
    except ValueError as error:
        pytest.fail(f"matplotlib read {name!r} as a formula: {error}")
    assert png.startswith(b"\x89PNG")
    # What matplotlib draws: `$` where the name has one.
    shown, is_formula = axes.get_yticklabels()[0]._preprocess_math(axes.get_yticklabels()[0].get_text())
    assert (shown, is_formula) == (name, False)


@pytest.mark.parametrize("name", ["😀 smile", "猫", "नमस्ते", "\x00nul", "a\x1b[31m", "\ud83d", "x" * 5000])
def test_odd_characters_in_plots_are_drawn_without_a_word(name):
    """C6: no warning of glyphs, no picture of pages."""
    figure, axes = plt.subplots(figsize=(2, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw_confusion(axes, np.eye(2, dtype=int), [name, "other"])
        png = render_figure(figure)
    assert [str(one.message) for one in caught] == []
    width, height = (int.from_bytes(png[start : start + 4]) for start in (16, 20))
    assert width < 1500 and height < 1500


def test_labels_are_short_and_visible():
    """C6."""
    from s4v.pages import label

    assert label(ODD) == SHOWN.replace("$", r"\$")
    assert label("y" * 100) == "y" * 60 + "..."


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a'b\"c&d", "\x00\x1b\x0c", "\ud83d half", "\udcff"])
def test_pages_hold_texts_and_no_markup_of_them(tmp_path, text):
    """C6: also what no file of UTF-8 can hold."""
    from s4v.pages import escape

    write_page(tmp_path / "p.html", text, [draw_table(["name"], [[text]])])
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count(escape(text)) == 2
    assert "<script" not in page and not re.search("[\x00-\x09\x0b-\x1f\ud800-\udfff]", page)


def test_a_gallery_of_odd_names_is_a_page(odd_folder, tmp_path, make_config):
    """C6."""
    extract_dataset(make_config(odd_folder, tmp_path / "s.zarr", frames={"": 2}, num_decoders=1))
    with Searcher(open_store(tmp_path / "s.zarr")) as searcher:
        (answer,) = searcher.find_text("anything")
    write_gallery(tmp_path / "g.html", open_store(tmp_path / "s.zarr"), {f"<b>{ODD}": [answer]})
    page = (tmp_path / "g.html").read_text()
    assert f"&lt;b&gt;{SHOWN}" in page and f"train/{SHOWN}/good.mp4" in page and "\x1b" not in page
