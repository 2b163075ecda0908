"""Options that come from a config: defaults, parsing, help."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from s4v.cli import COMMANDS, app
from s4v.commands._extraction import SPELLINGS
from s4v.commands._options import Spelling, read_field_help, takes_options
from s4v.demo.world import WorldConfig
from s4v.errors import ConfigError
from s4v.extract.config import ExtractConfig
from s4v.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Toy:
    name: str
    """Of the `toy`,
    in a line.

    And more."""
    kind: Literal["a", "b"] | None = None
    """Which."""
    layers: tuple[int, ...] | None = None
    """Blocks."""
    with_pixels: bool = True
    """Do not store frames."""
    out: Path = Path("x")
    """Where."""


def call(*arguments, **options):
    values = []
    alone = typer.Typer()

    @alone.command()
    @takes_options(Toy, **options)
    def toy(options, times: Annotated[int, typer.Option()] = 1):
        values.append((options.parse(), times))

    result = CliRunner().invoke(alone, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return values[0] if values else result


PIXELS = {"with_pixels": Spelling(option="no-pixels")}


def test_values_are_those_of_the_fields():
    default = {"name": "n", "kind": None, "layers": None, "with_pixels": True, "out": Path("x")}
    assert call("--name", "n", spellings=PIXELS) == (default, 1)
    given = call("--name", "n", "--layers", "5,1", "--no-pixels", "--kind", "b", "--times", "2", spellings=PIXELS)
    assert given == ({**default, "kind": "b", "layers": (1, 5), "with_pixels": False}, 2)


def test_a_field_without_a_default_is_required():
    assert call().exit_code == 2


def test_numbers_that_are_none_are_the_configs_own_error():
    with pytest.raises(ConfigError, match="--layers takes numbers such as 1,3,5; found 'x'"):
        call("--name", "n", "--layers", "x")


def test_fields_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="Toy has no field nonsense"):
        takes_options(Toy, leave_out=("nonsense",))


def test_help_is_the_first_paragraph_of_the_docstring():
    assert read_field_help(Toy)["name"] == "Of the toy, in a line."


@pytest.mark.parametrize("config", [ExtractConfig, TrainConfig, WorldConfig])
def test_every_field_has_help(config):
    assert {field.name for field in fields(config)} == set(read_field_help(config))


@pytest.mark.parametrize("name", [name for name, one in SPELLINGS.items() if one.show is not None])
def test_defaults_are_read_as_they_are_shown(name):
    (field,) = (field for field in fields(ExtractConfig) if field.name == name)
    default = field.default_factory()
    assert SPELLINGS[name].parse(SPELLINGS[name].show(default)) == default


def test_every_command_is_listed_with_its_help():
    listed = CliRunner().invoke(app, ["--help"]).output
    for name in COMMANDS:
        assert f"\n  {name} " in listed
