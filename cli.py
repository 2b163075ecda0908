"""The `s4v` command: a front door. What a command takes and does stands in commands/, one file each."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .terminal import set_up_output

COMMANDS = {
    "extract": "extract",
    "plan": "plan",
    "scan": "scan",
    "datasets": "datasets",
    "info": "info",
    "merge": "merge",
    "verify": "verify",
    "train": "train",
    "eval": "evaluate",
    "sweep": "sweep",
    "compare": "compare",
    "cache": "cache",
    "import": "import_checkpoint",
    "import-features": "import_features",
    "retrieve": "retrieve",
    "index": "index",
    "demo": "demo",
    "world": "world",
}
"""Modules of commands/, by what is typed. Each has a function of its name, whose docstring is the command's help."""


class FrontDoor(TyperGroup):
    """Commands that are imported when they are called: one does not wait for what another needs."""

    def __init__(self, **attributes: Any) -> None:
        attributes["commands"] = {name: TyperCommand(name) for name in COMMANDS}  # names, for hints after a typo
        super().__init__(**attributes)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, imported; None if there is none of that name."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands by their modules' docstrings, without importing them."""
        stubs = {name: TyperCommand(name, help=read_help(name)) for name in COMMANDS}
        TyperGroup(commands=stubs).format_commands(ctx, formatter)  # type: ignore[arg-type]


app = typer.Typer(
    name="s4v",
    cls=FrontDoor,
    help="Run the giant frozen ViT once; train video models from its cached tokens on one modest GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        from . import __version__

        typer.echo(f"s4v {__version__}")
        raise typer.Exit


@app.callback()
def _open_door(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Typer makes a group of an app that has a callback; its docstring is not shown, for the app has a help."""


def main() -> None:
    """Entry of the console script."""
    set_up_output()
    app()


def load_command(name: str) -> Any:
    """Import a command.

    Args:
        name: A key of `COMMANDS`.
    """
    function = COMMANDS[name]
    module = import_module(f".commands.{function}", __package__)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name)(getattr(module, function))
    return typer.main.get_command(alone)


def read_help(name: str) -> str:
    """A command's help, from its source.

    Args:
        name: A key of `COMMANDS`.
    """
    function = COMMANDS[name]
    spec = find_spec(f".commands.{function}", __package__)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return ast.get_docstring(found) or ""
