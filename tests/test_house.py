"""What keeps the house in order: short functions, few parameters, and no question for a name outside its own room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import s4v
from s4v.train.networks import NETWORKS
from s4v.train.tasks import TASKS

ROOT = Path(s4v.__file__).parent

# Rooms where a network's or a task's name belongs: its own, and what a paper released of it.
OWN_ROOMS = ("train/networks", "train/tasks", "train/paper", "demo", "tests", "benchmarks", "docs")


def modules(*folders):
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in files}


PACKAGES = [folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file() and folder.name != "tests"]


def is_default(node, parents):
    """Of an option: `head: str = "side4video"`, or what an annotation or a help text says."""
    return any(isinstance(one, ast.AnnAssign | ast.arguments | ast.Expr) for one in parents)


def questions(tree, names):
    """Places where a name stands in a comparison, a `match`, a lookup or a call of startswith."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            inside = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            inside = [node.value]
        elif isinstance(node, ast.Subscript):
            inside = [node.slice]
        elif isinstance(node, ast.Dict):
            inside = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            inside = node.args if node.func.attr in ("startswith", "endswith", "get", "setdefault", "pop") else []
        else:
            continue
        for one in inside:
            for leaf in ast.walk(one):
                if isinstance(leaf, ast.Constant) and leaf.value in names:
                    yield leaf.lineno, leaf.value


CLASSES = {type(kind).__name__ for kind in NETWORKS.values()} | {task.__name__ for task in TASKS.values()}
CLASSES |= {"SideNetwork", "RetrievalSideNetwork", "SideLadder", "LinearProbe", "AttentiveProbe"}


def type_questions(tree):
    """isinstance, issubclass or `type(...) is` of a network or a task."""
    for node in ast.walk(tree):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if is_call and node.func.id in ("isinstance", "issubclass"):
            for leaf in ast.walk(node.args[1]):
                if isinstance(leaf, ast.Name) and leaf.id in CLASSES:
                    yield node.lineno, leaf.id


def test_nobody_asks_for_the_name_of_a_network_or_a_task():
    names = {*NETWORKS, *TASKS}
    found = {
        (file, line, name)
        for file, tree in modules(*PACKAGES).items()
        if not file.startswith(OWN_ROOMS)
        for line, name in (*questions(tree, names), *type_questions(tree))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ('if config.task == "retrieval": pass', 1),
        ('if head in ("linear", "attentive"): pass', 2),
        ('SIZES = {"side4video": 1}', 1),
        ('x = SIZES["linear"]', 1),
        ('match head:\n    case "attentive": pass', 1),
        ('if name.startswith("side4video"): pass', 1),
        ("isinstance(network, SideLadder)", 1),
        ('def train(head: str = "side4video"): pass', 0),
    ],
)
def test_such_questions_are_found(code, count):
    tree = ast.parse(code)
    assert len([*questions(tree, {*NETWORKS, *TASKS}), *type_questions(tree)]) == count


def functions(tree):
    """Each function with the lines of its body, its docstring aside, and its parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            lines = node.end_lineno - node.lineno + 1
            lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            arguments = node.args
            given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            yield node.name, lines, len([one for one in given if one.arg not in ("self", "cls")])


MEASURED = {
    f"{file}: {name}": (lines, parameters)
    for file, tree in modules(*(set(PACKAGES) - {"demo"})).items()
    if "/" in file
    for name, lines, parameters in functions(tree)
}


def test_no_function_is_longer_than_a_screen():
    assert {name: lines for name, (lines, _) in MEASURED.items() if lines > 60} == {}


def test_no_signature_is_longer_than_twelve():
    """But those of commands, whose parameters are options."""
    too_long = {name: many for name, (_, many) in MEASURED.items() if many > 12 and not name.startswith("commands/")}
    assert too_long == {}


def test_functions_are_measured():
    assert len(MEASURED) > 1000 and max(lines for lines, _ in MEASURED.values()) > 40
