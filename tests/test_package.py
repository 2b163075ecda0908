"""The package as it is installed: names, boundaries, the wheel."""

import ast
import functools
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import s4v
from s4v.store._chunk_reads import find_native

ROOT = Path(s4v.__file__).parent


def test_no_module_of_ours_is_loaded_under_another_name():
    ours = {
        name
        for name, module in list(sys.modules.items())
        if (file := getattr(module, "__file__", None))
        and Path(file).is_relative_to(ROOT)
        and not Path(file).is_relative_to(ROOT / "tests")
        and not Path(file).is_relative_to(ROOT / ".venv")
    }
    assert ours
    assert {name for name in ours if name != "s4v" and not name.startswith("s4v.")} == set()


def test_importing_s4v_is_light():
    code = "import sys, s4v; print(sorted({'torch', 'numpy', 'pyarrow'} & set(sys.modules)), s4v.__version__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f"[] {s4v.__version__}"


def test_everything_offered_at_the_top_is_there():
    for name in s4v.__all__:
        assert getattr(s4v, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = s4v.nonsense


def test_modules_are_found_by_their_old_names():
    import s4v.moved

    for old, new in s4v.moved.MOVED.items():
        sys.modules.pop(old, None)
        with pytest.warns(DeprecationWarning, match=f"{old} is {new} now"):
            module = importlib.import_module(old)
        assert module is importlib.import_module(new) and module.__spec__.name == module.__name__ == new
        sys.modules.pop(old)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("s4v.train.nonsense")


FLOORS = (
    ("errors", "files", "device", "moved", "process_identity", "terminal", "progress", "vectors"),
    ("store",),
    ("backbone", "pages"),
    ("extract", "train"),
    ("retrieve",),
    ("demo",),
    ("commands",),
    ("cli", "__init__", "__main__"),
)
"""What a module imports lies in its own folder, or lower. Folders of one floor do not know each other."""


@functools.cache
def modules():
    """All modules of the package, by their paths from its root; setup.py is of no package."""
    folders = {name for floor in FLOORS for name in floor}
    files = [
        *(file for file in ROOT.glob("*.py") if file.name != "setup.py"),
        *(file for folder in folders for file in (ROOT / folder).rglob("*.py")),
    ]
    return {file.relative_to(ROOT).with_suffix("").parts: file for file in files}


def imports_of(parts, file, *, of_types=False):
    """Modules of ours that a module imports, and the names, at any depth of its code."""
    known = modules()
    tree = ast.parse(file.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not of_types:
            skipped |= {id(inner) for inner in ast.walk(node)}
    package = parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in skipped:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split(".")) * bool(node.module)
            for alias in node.names:
                if (*base, alias.name) in known:
                    yield (*base, alias.name), None
                else:
                    yield (base if base in known else (*base, "__init__")), alias.name


def floor_of(parts):
    return next(place for place, floor in enumerate(FLOORS) if parts[0] in floor)


def test_every_module_stands_on_a_floor():
    assert {parts[0] for parts in modules()} <= {name for floor in FLOORS for name in floor}


def test_imports_point_down():
    wrong = [
        (parts, target)
        for parts, file in modules().items()
        for target, _ in imports_of(parts, file)
        if parts[0] != target[0]
        and (floor_of(target) > floor_of(parts) or (floor_of(target) == floor_of(parts) and len(parts) > 1))
    ]
    assert wrong == []


def test_no_private_module_or_name_is_imported_across_folders():
    wrong = [
        (parts, target, name)
        for parts, file in modules().items()
        for target, name in imports_of(parts, file, of_types=True)
        if parts[:-1] != target[:-1]
        and any(word.startswith("_") and word != "__init__" for word in (*target, *([name] if name else [])))
    ]
    assert wrong == []


def run_by(parts, target):
    """What Python runs for an import: the module, and the packages around it that are not around who imports it."""
    yield target
    for depth in range(1, len(target)):
        package = (*target[:depth], "__init__")
        if parts[:depth] != target[:depth] and package in modules():
            yield package


def test_no_imports_go_round():
    """Not even inside functions."""
    arrows = {
        parts: {one for target, _ in imports_of(parts, file) for one in run_by(parts, target) if one != parts}
        for parts, file in modules().items()
        if parts != ("__init__",)
    }
    done, way = set(), []

    def follow(parts):
        assert parts not in way, " -> ".join("/".join(one) for one in [*way[way.index(parts) :], parts])
        if parts not in done:
            way.append(parts)
            for target in sorted(arrows.get(parts, ())):
                follow(target)
            done.add(way.pop())

    for parts in sorted(arrows):
        follow(parts)


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def build_wheel(folder, **environment):
    """A wheel of what is committed, and the files of its package."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout: the wheel is built from what is committed")
    tree = folder / "s4v-main"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
    (tree / "store/x.zarr").mkdir()
    (tree / "store/x.zarr/zarr.json").write_text("{}")
    command = [*PIP, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, tree]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("s4v-*.whl")
    with zipfile.ZipFile(wheel) as archived:
        names = {name.removeprefix("s4v/") for name in archived.namelist() if name.startswith("s4v/")}
    return wheel, names


@pytest.mark.slow  # two builds
def test_a_wheel_without_the_native_module_is_built_where_it_cannot_be_or_is_not_wanted(tmp_path):
    for name, environment in {"pure": {"S4V_NATIVE": "0"}, "none": {"CC": "false", "S4V_NATIVE": "1"}}.items():
        (tmp_path / name).mkdir()
        wheel, files = build_wheel(tmp_path / name, **environment)
        assert "store/_chunk_reads.py" in files and not [one for one in files if one.endswith((".so", ".pyd", ".c"))]
        assert wheel.name.endswith("py3-none-any.whl") == (name == "pure")


def test_wheel_holds_the_package_and_nothing_else_and_works_elsewhere(tmp_path):
    wheel, files = build_wheel(tmp_path)
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", site, wheel], check=True)
    if (native := find_native()[0]) is not None:
        assert Path(native.__file__).name in {name.removeprefix("store/") for name in files}
        assert "-abi3-" in wheel.name
    assert {name.split("/")[0] for name in files} == {
        *("backbone", "commands", "demo", "extract", "retrieve", "store", "train"),
        "__init__.py",
        "__main__.py",
        "cli.py",
        "device.py",
        "errors.py",
        "files.py",
        "moved.py",
        "pages.py",
        "process_identity.py",
        "progress.py",
        "py.typed",
        "terminal.py",
        "vectors.py",
    }
    assert {f"backbone/tiny_clip/tiny-clip.{ending}" for ending in ("json", "jsonl", "md", "safetensors")} <= files
    assert not [name for name in files if ".zarr" in name or "test" in name]
    code = (
        "import s4v, s4v.backbone.open_clip_models as a; print(s4v.__file__); print(a.resolve_model('tiny-clip'))\n"
        "import s4v.cli, s4v.train.loop, s4v.retrieve.search, s4v.demo.pipeline, s4v.extract.extraction\n"
        "import s4v.backbone.text_tower as t, torch\n"
        "print(t.load_text_tower('tiny-clip', weights=None, device=torch.device('cpu')).encode(['a red ring']).shape)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.startswith(str(site))
    assert out.stdout.endswith("(1, 128)\n")
