"""The package as it is installed: names, boundaries, the wheel."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import s4v

ROOT = Path(s4v.__file__).parent
PACKAGES = ("demo", "extract", "retrieve", "store", "train")


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


def imported_packages(folder):
    """Our packages that the modules of a folder import, at any depth."""
    found = set()
    for file in (ROOT / folder).rglob("*.py"):
        depth = len(file.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth and node.module:
                found.add(node.module.split(".")[0])
    return found & set(PACKAGES)


def test_dependencies_point_one_way():
    assert imported_packages("store") == set()
    assert imported_packages("extract") == {"store"}
    assert imported_packages("train") == {"store"}
    assert imported_packages("retrieve") <= {"extract", "store", "train"}


def test_only_the_text_tower_of_extract_is_used_by_retrieve():
    names = set()
    for file in (ROOT / "retrieve").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("extract"):
                names |= {(node.module, alias.name) for alias in node.names}
    assert names == {("extract.text_tower", "TextTower"), ("extract.text_tower", "load_text_tower")}


def test_wheel_holds_the_package_and_nothing_else_and_works_elsewhere(tmp_path):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout: the wheel is built from what is committed")
    tree = tmp_path / "s4v-main"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
    (tree / "store/x.zarr").mkdir()
    (tree / "store/x.zarr/zarr.json").write_text("{}")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, tree], check=True)
    (wheel,) = tmp_path.glob("s4v-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    files = {p.relative_to(site / "s4v").as_posix() for p in (site / "s4v").rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {name.split("/")[0] for name in files} == {
        *PACKAGES,
        "__init__.py",
        "__main__.py",
        "cli.py",
        "errors.py",
        "pages.py",
        "progress.py",
        "py.typed",
        "terminal.py",
    }
    assert {f"extract/models/tiny-clip.{ending}" for ending in ("json", "jsonl", "md", "safetensors")} <= files
    assert not [name for name in files if ".zarr" in name or "test" in name]
    code = (
        "import s4v, s4v.extract.architectures as a; print(s4v.__file__); print(a.resolve_model('tiny-clip'))\n"
        "import s4v.cli, s4v.train.loop, s4v.retrieve.search, s4v.demo.pipeline, s4v.extract.extraction\n"
        "import s4v.extract.text_tower as t, torch\n"
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
