"""The documents: sentences that are read once, and names of files, modules, commands and options that exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import typer.main

from s4v.cli import app

ROOT = Path(__file__).parents[1]
MAX_WORDS = 25
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
"""CHANGELOG.md is not one of them: it tells of names that went."""

FENCE = re.compile(r"^```.*?^```[^\n]*$", re.MULTILINE | re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\.\.\.)[)\"*_]*\s+|(?<=[.!?][)\"*])[)\"*_]*\s+")
PYTHON_FILE = re.compile(r"(?<![\w/.*{-])((?:[\w.-]+/)*\w+\.py)\b")
MODULE = re.compile(r"(?<![\w./-])s4v(?:\.[A-Za-z_]\w*)+")


def list_paragraphs(text: str) -> list[str]:
    """Prose of a Markdown text: no code block, table, indented formula, picture or address; inline code is one word."""
    text = FENCE.sub("\n", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs: list[str] = []
    is_open = False
    for line in text.splitlines():
        is_item = re.match(r"\s*([*-]|\d+\.)\s", line) is not None
        if not line.strip() or line.lstrip().startswith(("|", "#")) or (line.startswith("    ") and not is_open):
            is_open = False
        elif is_open and not is_item:
            paragraphs[-1] += " " + line.strip()
        else:
            paragraphs.append(re.sub(r"^\s*([*-]|\d+\.)\s+", "", line).strip())
            is_open = True
    return paragraphs


def list_sentences(text: str) -> list[str]:
    """Sentences of a Markdown text's prose."""
    return [
        sentence
        for paragraph in list_paragraphs(text)
        for sentence in SENTENCE_END.split(paragraph)
        if sentence.strip()
    ]


def count_words(sentence: str) -> int:
    """Words and numbers; signs that stand alone (a %, a dash) are none."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def find_slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def is_importable(name: str) -> bool:
    """Whether `s4v.a.b` is a module of the tree, or a name in one."""
    parts = name.split(".")[1:]
    for depth in range(len(parts), -1, -1):
        path = ROOT.joinpath(*parts[:depth])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            module = importlib.import_module(".".join(["s4v", *parts[:depth]]))
            return depth == len(parts) or hasattr(module, parts[depth])
    return False


def list_missing_names(text: str, folder: Path) -> list[str]:
    """Python files, modules, imports and linked files that a document names and the tree does not have."""
    missing = []
    for path in PYTHON_FILE.findall(re.sub(r"\]\([^)]*\)", "]", text)):  # links are looked up below
        is_there = (ROOT / path).is_file() if "/" in path else bool(list_files(path))
        missing += [] if is_there else [path]
    missing += [name for name in MODULE.findall(text) if not is_importable(name)]
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "s4v":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                missing += [name for name in names if not is_importable(name)]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = folder / file if file else None
        if path is not None and not path.exists():
            missing.append(target)
        elif anchor:
            headings = re.findall(r"^#+\s+(.*)$", text if path is None else path.read_text("utf-8"), flags=re.MULTILINE)
            missing += [] if anchor in map(find_slug, headings) else [target]
    return missing


def list_files(name: str) -> list[Path]:
    """Files of that name in the package and its tests."""
    folders = [
        path for path in ROOT.iterdir() if (path / "__init__.py").is_file() or path.name in ("tests", "benchmarks")
    ]
    return [*ROOT.glob(name), *(path for folder in folders for path in folder.rglob(name))]


def list_unknown_options(text: str) -> list[str]:
    """Commands and options in the code of a document that `s4v` does not have."""
    group = typer.main.get_command(app)
    context = typer.Context(group)
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
    options = {
        name: {o for p in command.params for o in [*p.opts, *p.secondary_opts]} for name, command in commands.items()
    }
    unknown = []
    for code in [*FENCE.findall(text), *re.findall(r"`(s4v [^`]+)`", FENCE.sub("", text))]:
        for line in code.splitlines():
            call = re.match(r"(?:\$ |torchrun .* -m )?s4v ([a-z-]+)(.*)", line.split(" #")[0])
            if call and call[1] not in options:
                unknown.append(call[1])
            elif call:
                unknown += [
                    o for o in re.findall(r"(?<!\S)--[a-z][\w-]*", call[2]) if o not in options[call[1]] | {"--help"}
                ]
    return unknown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_sentences_are_short(document):
    sentences = list_sentences(read(document))
    assert sentences
    long = [f"{count_words(sentence)}: {sentence}" for sentence in sentences if count_words(sentence) > MAX_WORDS]
    assert long == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_documents_exist(document):
    text = read(document)
    assert list_missing_names(text, (ROOT / document).parent) == []
    assert list_unknown_options(text) == []


def test_every_command_has_its_line_in_the_list_of_commands():
    text = read("docs/commands.md")
    named = {command for block in FENCE.findall(text) for command in re.findall(r"s4v ([a-z-]+)", block)}
    assert named >= set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_a_long_sentence_is_found_wherever_it_stands():
    long = " ".join(["word"] * 26) + "."
    for text in (long, f"Short. {long} Short.", f"* Item.\n* {long}", f"**Heading.** {long}", f"Short (so).\n{long}"):
        assert [count_words(s) for s in list_sentences(text) if count_words(s) > MAX_WORDS] == [26]
    exempt = (f"```\n{long}\n```", f"| a | b |\n|---|---|\n| {long} | |", f"    {long}", f"# {long}", f"`{long}`")
    for text in (" ".join(["word"] * 25) + ".", *exempt):
        assert all(count_words(s) <= MAX_WORDS for s in list_sentences(text))


def test_names_that_are_gone_are_found():
    gone = "`store/nothing.py`, `nothing.py`, s4v.store.nothing and s4v.store.reader.nothing"
    gone += ", [a](nothing.md), [b](README.md#no)"
    assert list_missing_names(gone, ROOT) == [
        "store/nothing.py",
        "nothing.py",
        "s4v.store.nothing",
        "s4v.store.reader.nothing",
        "nothing.md",
        "README.md#no",
    ]
    assert list_missing_names("```python\nfrom s4v.store.reader import Nothing\n```", ROOT)[-1].endswith(".Nothing")
    there = "`store/reader.py`, `reader.py`, s4v.open_store, s4v.store.reader.StoreReader, [a](README.md#read-on)"
    assert list_missing_names(there, ROOT) == []
    assert list_unknown_options("```\ns4v nothing\ns4v info x --nothing --json\n```") == ["nothing", "--nothing"]
    assert list_unknown_options("`s4v nothing`, `s4v info x --nothing`") == ["nothing", "--nothing"]
