"""What users have typed into scripts: the names, types and defaults of all options stay."""

import json
from pathlib import Path

import pytest
import typer

from s4v.cli import app

GOLDEN = Path(__file__).parents[1] / "data/cli_options.json"
"""Made by `describe_commands` of s4v before its options came from config classes."""

NEW = {
    "extract": (
        *("--codec", "--validation-clip", "--pixel-offsets", "--pixel-edge", "--input", "--augmentation"),
        *("--text-layers", "--text-words", "--class-template", "--cls", "--for"),
        *("--cls-dtype", "--cls-channels", "--pixel-format"),
    ),
    "plan": (
        *("--pixel-offsets", "--input", "--text-layers", "--text-words", "--class-template", "--cls", "--for"),
        *("--sampling", "--cls-dtype", "--cls-channels", "--pixel-format"),
    ),
    "scan": ("--validation-clip", "--pixel-offsets", "--pixel-edge"),
    "train": (
        *("--set", "--norm-clips", "--log-every", "--optimizer", "--undecayed", "--order-seed", "--hold-out"),
        *("--min-video-frames", "--train-views", "--window", "--cache", "--cache-size", "--max-bad"),
        *("--mix", "--mixup-alpha", "--cutmix-alpha"),
    ),
    "eval": ("--classes", "--zero-shot-average"),
    "import": ("--classes",),
    "compare": ("--run", "--split", "--checkpoint"),
    "world": ("--long", "--queries"),
}
"""Options that have come since, by command."""

LEFT_OPEN = {"train": {"--interaction": "mean"}, "import": {"--frames": 8}}
"""Options that a preset or a file may decide since, by command: what they come to where none does."""


def describe_commands():
    """Options by command and name: what decides how a command line is read."""
    group = typer.main.get_command(app)
    context = typer.Context(group)
    commands = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        commands[name] = {param.opts[0]: describe(param, typer.Context(command)) for param in command.params}
    return commands


def describe(param, context):
    return {
        "kind": param.param_type_name,
        "names": param.opts,
        "secondary_names": param.secondary_opts,
        "type": describe_type(param, context),
        "default": str(param.default) if isinstance(param.default, Path) else param.default,
        "is_required": param.required,
        "is_hidden": getattr(param, "hidden", False),
        "takes_many": param.multiple or param.nargs != 1,
    }


def describe_type(param, context):
    """What help shows for it: a word of typer's, which differs from one typer to another, or the choices."""
    if getattr(param, "is_flag", False):
        return "flag"
    shown = param.get_help_record(context)[0].split()[-1].lower().rstrip(".")
    shown = shown.replace("<list[", "<").replace("]>", ">")  # `takes_many` says so
    words = {"<str>": "text", "<int>": "integer", "<float>": "float", "<path>": "path"}
    return words.get(shown, shown)


@pytest.mark.parametrize("command", json.loads(GOLDEN.read_text()))
def test_options_are_read_as_ever(command):
    found, golden = describe_commands()[command], json.loads(GOLDEN.read_text())[command]
    for name, usual in LEFT_OPEN.get(command, {}).items():
        assert found[name]["default"] is None and golden[name]["default"] == usual
        golden[name]["default"] = None
    assert {name: one for name, one in found.items() if name not in NEW.get(command, ())} == golden
    assert set(NEW.get(command, ())) <= set(found)


NEW_COMMANDS = ("sweep", "cache", "import-features")
"""That have come since."""


def test_no_command_has_gone_or_come():
    commands = [name for name in describe_commands() if name not in NEW_COMMANDS]
    assert commands == list(json.loads(GOLDEN.read_text()))


def test_the_version_is_told():
    from typer.testing import CliRunner

    import s4v

    result = CliRunner().invoke(app, ["--version"], catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout == f"s4v {s4v.__version__}\n"
