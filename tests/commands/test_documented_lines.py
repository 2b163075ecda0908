"""Every command line of the documentation is one that s4v takes; README's pipelines run whole on miniatures."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import s4v
from s4v.cli import app
from s4v.errors import ConfigError

ROOT = Path(s4v.__file__).parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
REST_WORD = re.compile(r"\s\.\.\.(?=\s|$)")
TORCHRUN = re.compile(r"^torchrun --nproc-per-node \d+ -m s4v ")

REST = {
    "extract": "--model vit-b16 --dataset folder --root VIDEOS",
    "scan": "--dataset folder --root VIDEOS",
    "plan": "--model vit-b16 --videos 9",
    "train": "--features store/mine.zarr",
    "eval": "--run runs/mine",
}
"""What `...` stands for, by command; an option that is given beside it is not given twice."""

PLACEHOLDERS = {"I/N": "2/8"}
"""Capitals for which a reader puts something of their own."""

REPLACED = {
    "--model vit-e": "--model tiny-clip",
    "--model vit-b16": "--model tiny-clip",
    '--query "text"': '--query "a ring moves left"',
}
"""What README's lines have and a miniature has not: giants, and words that tiny-clip does not know."""

PIPELINES = {"k400": "k400", "msrvtt": "msrvtt"}
"""README's pipelines by the data set that they begin with, which lies in its default place: data/NAME."""


def list_lines(text):
    """Command lines of a document's blocks, as a shell would read them, without prompts and comments."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = TORCHRUN.sub("s4v ", line.strip().removeprefix("$ "))
            if line.startswith("s4v "):
                yield line


def read_words(line):
    has_rest = REST_WORD.search(line) is not None
    words = shlex.split(REST_WORD.sub(" ", line), comments=True)[1:]
    rest = shlex.split(REST[words[0]]) if has_rest else []
    pairs = [rest[place : place + 2] for place in range(0, len(rest), 2)]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    return [*words, *(word for pair in pairs if pair[0] not in words for word in pair)]


def parse(words):
    """Read a command's words as its command line; nothing is run. Raises what typer raises for a wrong one."""
    group = typer.main.get_command(app)
    context = typer.Context(group)
    command = group.get_command(context, words[0])
    assert command is not None, f"no command {words[0]}"
    return command.make_context(words[0], list(words[1:]), parent=context)


def gather():
    lines = [(document, line) for document in DOCUMENTS for line in list_lines((ROOT / document).read_text())]
    return [pytest.param(line, id=f"{document}: {line}") for document, line in lines if "--help" not in line]


CHECKED = {
    "extract": "s4v.extract.extraction.extract_dataset",
    "scan": "s4v.extract.scan.scan_dataset",
    "plan": "s4v.extract.plan.plan_command",
}
"""What a command calls once its options were checked; up to there nothing is read, and what is said is checked too."""


class ReachedError(ConfigError):
    pass


def check(words, monkeypatch):
    """Parse a command's words and, where options alone decide, have the command check what they say."""
    parse(words)
    if words[0] in CHECKED:

        def stop(*_, **__):
            raise ReachedError("as far as options go, this is right")

        monkeypatch.setattr(CHECKED[words[0]], stop)
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert "as far as options go, this is right" in result.output, result.output


@pytest.mark.parametrize("line", gather())
def test_a_documented_line_is_a_command_line(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check(read_words(line), monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "s4v extract --modle x --dataset k400",
        "s4v extract --model x --dataset k4000",
        "s4v extract ... --views val=thre",
        "s4v eval --split",
        "s4v plan --videos many --model x",
    ],
)
def test_a_wrong_line_is_found(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception):  # noqa: B017 (typer's own, whose class differs from one typer to another, or ours)
        check(read_words(line), monkeypatch)


def pipeline_of(dataset):
    """README's lines from the extraction of a data set to the end of their block."""
    blocks = [list(list_lines(f"```\n{block}```")) for block in FENCE.findall((ROOT / "README.md").read_text())]
    (lines,) = [lines for lines in blocks if lines and f"--dataset {dataset}" in lines[0]]
    return lines


@pytest.mark.parametrize("dataset", PIPELINES)
def test_a_pipeline_of_the_readme_runs_as_written(dataset, write_miniature, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_miniature(dataset, tmp_path / "data" / dataset)
    lines = pipeline_of(dataset)
    assert [line.split()[1] for line in lines[:2]] == ["extract", "train"]
    for line in lines:
        for written, used in REPLACED.items():
            line = line.replace(written, used)
        result = CliRunner().invoke(app, read_words(line), catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
