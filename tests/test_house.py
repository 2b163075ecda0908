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


MOST_LINES = 60
"""Of a function, its docstring not counted."""
MOST_PARAMETERS = 12
"""Outside commands/, whose parameters are a command's options."""


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def count_lines(function):
    """From `def` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= first.end_lineno - first.lineno + 1
    return lines


def count_parameters(function):
    """Whatever a caller may give."""
    args = function.args
    named = [arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs) if arg.arg not in ("self", "cls")]
    return len(named) + (args.vararg is not None) + (args.kwarg is not None)


def find_offenders(name, tree):
    for function in functions(tree):
        lines, parameters = count_lines(function), count_parameters(function)
        is_command = name.startswith("commands/")
        if lines > MOST_LINES or (parameters > MOST_PARAMETERS and not is_command):
            yield name, function.name, lines, parameters


def test_no_function_is_too_long_and_no_signature_too_wide():
    measured = modules(*(set(PACKAGES) - {"demo"}))
    assert sum(len(functions(tree)) for tree in measured.values()) > 1000
    assert [one for name, tree in measured.items() for one in find_offenders(name, tree)] == []


@pytest.mark.parametrize(
    ("source", "is_offender"),
    [
        ("def f():\n" + "    x = 1\n" * 59, False),
        ("def f():\n" + "    x = 1\n" * 60, True),
        ('def f():\n    """Long.\n' + "\n" * 80 + '    """\n    return 1\n', False),
        ("class A:\n    async def f(self):\n" + "        x = 1\n" * 60, True),
        (f"def f({', '.join(f'a{i}' for i in range(12))}): ...", False),
        (f"def f({', '.join(f'a{i}' for i in range(11))}, *b, **c): ...", True),
        (f"def f(self, {', '.join(f'a{i}' for i in range(12))}): ...", False),
    ],
)
def test_the_rule_tells_what_breaks_it(source, is_offender):
    assert bool(list(find_offenders("store/toy.py", ast.parse(source)))) == is_offender


COVERED_BY = {
    "store/_row_differences.py": "extract/test_repair.py",
    "store/_shard_file.py": "store/test_reader.py",
    "store/_shards.py": "store/test_reader.py",
    "store/_zarr.py": "store/test_reader.py",
    "store/append.py": "extract/test_append.py",
    "store/needs.py": "train/test_needs.py",
    "store/repair.py": "extract/test_repair.py",
    "store/attributes.py": "store/test_hostile_store.py",
    "store/checksums.py": "store/test_verify.py",
    "store/codecs/contract.py": "contract/test_codecs.py",
    "store/fidelity.py": "store/test_affine.py",
    "store/fingerprint.py": "store/test_markers.py",
    "store/info.py": "test_messages.py",
    "store/manifest.py": "store/test_reader.py",
    "store/names.py": "store/test_hostile_store.py",
    "store/records.py": "store/test_reader.py",
    "store/redone.py": "extract/test_sources.py",
    "store/row_checks.py": "store/test_hostile_store.py",
    "store/skeleton.py": "store/test_writer.py",
    "store/spec.py": "store/test_writer.py",
    "store/swap.py": "extract/test_kill.py",
    "store/text_choice.py": "store/test_text_layers.py",
    "extract/batching.py": "extract/test_stages.py",
    "extract/caption_texts.py": "store/test_texts.py",
    "extract/changed_rows.py": "extract/test_sources.py",
    "extract/class_texts.py": "store/test_class_texts.py",
    "extract/codec_fit.py": "extract/test_stages.py",
    "extract/codec_report.py": "extract/test_stages.py",
    "extract/config.py": "commands/test_options.py",
    "extract/datasets/charades_sta.py": "extract/test_queries.py",
    "extract/datasets/ego4d_nlq.py": "extract/test_queries.py",
    "extract/datasets/qvhighlights.py": "extract/test_queries.py",
    "extract/datasets/tacos.py": "extract/test_queries.py",
    "extract/datasets/tvsum.py": "extract/test_queries.py",
    "extract/datasets/youtube_highlights.py": "extract/test_queries.py",
    "extract/disk_space.py": "extract/test_plan.py",
    "extract/extraction.py": "extract/test_stages.py",
    "extract/job.py": "extract/test_stages.py",
    "extract/kept_rows.py": "extract/test_repair.py",
    "extract/meter.py": "extract/test_stages.py",
    "extract/store_layout.py": "extract/test_plan.py",
    "extract/summary.py": "test_messages.py",
    "extract/text_needs.py": "store/test_text_layers.py",
    "extract/datasets/_clips.py": "extract/test_datasets_ucf_hmdb.py",
    "extract/datasets/_files.py": "extract/test_listing_truth.py",
    "extract/datasets/_names.py": "extract/test_annotation_names.py",
    "extract/datasets/_rows.py": "extract/test_datasets_lists.py",
    "extract/datasets/_splits.py": "extract/test_listing_truth.py",
    "extract/datasets/contract.py": "contract/test_datasets.py",
    "extract/datasets/folder.py": "extract/test_datasets.py",
    "extract/datasets/hmdb51.py": "extract/test_datasets_ucf_hmdb.py",
    "extract/datasets/kinetics.py": "extract/test_datasets_kinetics.py",
    "extract/datasets/lists.py": "extract/test_datasets_lists.py",
    "extract/datasets/msrvtt.py": "extract/test_datasets_captions.py",
    "extract/datasets/msvd.py": "extract/test_datasets_captions.py",
    "extract/datasets/report.py": "extract/test_datasets_check.py",
    "extract/datasets/something.py": "extract/test_datasets_something.py",
    "extract/datasets/table.py": "extract/test_datasets.py",
    "extract/datasets/ucf101.py": "extract/test_datasets_ucf_hmdb.py",
    "extract/datasets/vatex.py": "extract/test_datasets_captions.py",
    "extract/decode/containers.py": "extract/test_decoding_truth.py",
    "extract/decode/first_bytes.py": "extract/test_decoding_truth.py",
    "extract/decode/image_operations.py": "extract/test_augmented_views.py",
    "extract/decode/matroska.py": "extract/test_decoding_truth.py",
    "extract/decode/orientation.py": "extract/test_decoding_truth.py",
    "extract/decode/timeline.py": "extract/test_decoding_truth.py",
    "extract/decode/trouble.py": "extract/test_decoder_limits.py",
    "extract/decode/video_file.py": "extract/test_decoding_truth.py",
    "extract/decode/worker.py": "extract/test_pool.py",
    "extract/pipeline/batch_buffers.py": "extract/test_stages.py",
    "extract/pipeline/batch_encoder.py": "extract/test_stages.py",
    "extract/pipeline/dask_worker.py": "extract/test_dask_cluster.py",
    "train/choices.py": "commands/test_options.py",
    "train/config.py": "contract/test_networks.py",
    "train/preparation.py": "train/test_loop.py",
    "train/fabric.py": "train/test_loop.py",
    "train/logs.py": "train/test_resume.py",
    "train/networks/attentive_probe.py": "train/test_loop.py",
    "train/networks/contract.py": "contract/test_networks.py",
    "train/networks/zero_shot.py": "retrieve/test_zero_shot.py",
    "train/networks/parts.py": "train/test_side4video.py",
    "train/paper/checkpoint_file.py": "train/test_checkpoint_names.py",
    "train/paper/released.py": "train/test_checkpoint_names.py",
    "train/paper/side4video_names.py": "golden/test_golden.py",
    "train/paper/dist_names.py": "train/test_imported_networks.py",
    "train/paper/tds_clip_names.py": "golden/test_golden.py",
    "train/paper/r2_tuning_names.py": "train/test_r2_tuning.py",
    "train/paper/r2_tuning_presets.py": "train/test_r2_tuning.py",
    "train/uncorrected_adam.py": "train/test_recipe.py",
    "train/resume_state.py": "train/test_resume.py",
    "train/run_folder.py": "train/test_loop.py",
    "train/scorer.py": "train/test_evaluate.py",
    "train/settings.py": "train/test_presets.py",
    "train/tasks/contract.py": "contract/test_tasks.py",
    "train/tasks/recognition.py": "train/test_evaluate.py",
    "train/tasks/recognition_metrics.py": "train/test_evaluate.py",
    "train/tasks/recognition_page.py": "train/test_evaluate.py",
    "train/tasks/tuned_texts.py": "train/test_import_checkpoint.py",
    "retrieve/export.py": "retrieve/test_index_reader.py",
    "retrieve/index_writer.py": "retrieve/test_index_reader.py",
}
"""Modules without a test file of their name, and the one that goes through them."""


def test_every_module_has_tests_of_its_name_or_a_line_that_says_which():
    tests = {(path.parent.name, path.stem) for path in (ROOT / "tests").rglob("test_*.py")}
    own = [
        file.relative_to(ROOT).as_posix()
        for folder in ("store", "extract", "train", "retrieve")
        for file in (ROOT / folder).rglob("*.py")
        if file.stem != "__init__"
    ]
    without = {name for name in own if (name.split("/")[0], f"test_{Path(name).stem.lstrip('_')}") not in tests}
    assert without - set(COVERED_BY) == set(), "a test file of its name, or a line here"
    assert set(COVERED_BY) - without == set(), "it has one now"
    assert [test for test in COVERED_BY.values() if not (ROOT / "tests" / test).is_file()] == []
