"""Options of a command from the config class of what it runs: a field's name, type, default and docstring.

An option is written once, as a field. Where the command line says it in another way (`--no-pixels` for `with_pixels`,
`train=16,8` for a dict) the command has a `Spelling` of that field.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from ..errors import ConfigError
from ..files import parse_bytes

_SAME: Any = object()
_CONTEXT = "context"
"""The parameter in which typer hands over what it has read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """How a field is written on the command line; what is not given is as the field has it."""

    option: str | None = None
    """The option's name without its dashes. `no-...` of a boolean field is a flag that turns the field off."""
    type: Any = _SAME
    """Of the option, as typer takes it."""
    default: Any = _SAME
    """Of the option."""
    show: Callable[[Any], Any] | None = None
    """From the field's default to the option's, where that is no default of its own."""
    parse: Callable[[Any], Any] | None = None
    """From the option's value to the field's; may raise ConfigError."""
    help: str | None = None
    """Instead of the docstring's first paragraph."""
    is_open: bool = False
    """Whether the field is None where the option was not given: the default is what that comes to as a rule."""


def parse_size(option: str, text: str | None) -> int | None:
    """A number of bytes as an option takes it: `200GB`.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


class Options:
    """The options of one call that are fields of a config."""

    def __init__(self, spellings: Mapping[str, Spelling], given: Mapping[str, Any], typed: Collection[str]) -> None:
        self._spellings, self._given, self._typed = spellings, given, typed

    def __getitem__(self, field: str) -> Any:
        """What was given for a field, not parsed yet."""
        return self._given[field]

    def is_typed(self, field: str) -> bool:
        """Whether the user gave it, and not the default."""
        return field in self._typed

    def parse(self) -> dict[str, Any]:
        """The fields' values.

        Raises:
            ConfigError: If a text is not what its option takes.
        """
        values: dict[str, Any] = {}
        for name, value in self._given.items():
            spelling = self._spellings[name]
            if spelling.is_open and name not in self._typed:
                values[name] = None
            else:
                values[name] = value if spelling.parse is None else spelling.parse(value)
        return values


def takes_options(
    config: type,
    *,
    only: Collection[str] | None = None,
    leave_out: Collection[str] = (),
    spellings: Mapping[str, Spelling] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a config, before those that the command itself declares.

    Args:
        config: A dataclass with a docstring below each field.
        only: Fields to take; None takes all.
        leave_out: Fields that no option of this command sets.
        spellings: By field, where the command line says it differently.

    Returns:
        A decorator of the command, whose first parameter becomes the `Options`.

    Raises:
        ValueError: If a field that is named does not exist.
    """
    known = {field.name: field for field in fields(config) if field.init}
    if unknown := ({*(only or ()), *leave_out, *(spellings or {})} - set(known)):
        raise ValueError(f"{config.__name__} has no field {', '.join(sorted(unknown))}")
    hints, texts = get_type_hints(config), read_field_help(config)
    chosen = {
        name: _spell(field, hints[name], texts.get(name), (spellings or {}).get(name, Spelling()))
        for name, field in known.items()
        if name not in leave_out and (only is None or name in only)
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        context = inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [context, *(_as_parameter(name, one) for name, one in chosen.items()), *own]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in chosen}
            context = arguments.pop(_CONTEXT)
            command(Options(chosen, given, {name for name in chosen if is_typed(context, name)}), **arguments)

        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        )
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        del run.__wrapped__  # its signature is not the command's
        return run

    return decorate


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether a parameter stands on the command line that is being run, and is not the default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _spell(field: Field[Any], hint: Any, text: str | None, spelling: Spelling) -> Spelling:
    """A spelling in which all but `parse` is given."""
    option = spelling.option or field.name.replace("_", "-")
    default, parse = spelling.default, spelling.parse
    if default is _SAME:
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        default = default if spelling.show is None else spelling.show(default)
    if hint is bool and option.startswith("no-"):
        default, parse = not default, _negate
    elif _without_none(hint) == tuple[int, ...] and parse is None:
        hint, parse = str | None, functools.partial(parse_numbers, f"--{option}")
    if spelling.type is not _SAME:
        hint = spelling.type
    hint = _as_option_type(hint)
    return replace(spelling, option=option, type=hint, default=default, parse=parse, help=spelling.help or text)


def _as_parameter(name: str, spelling: Spelling) -> inspect.Parameter:
    info = typer.Option(f"--{spelling.option}", help=spelling.help)
    default = inspect.Parameter.empty if spelling.default is MISSING else spelling.default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[spelling.type, info]
    )


def _negate(value: bool) -> bool:
    return not value


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    return hint


def _as_option_type(hint: Any) -> Any:
    """A field's type as typer takes it: of words there are texts, which the config checks and tells as it tells all."""
    bare = _without_none(hint)
    if get_origin(bare) is Literal:
        return str if bare is hint else str | None
    return hint


def read_field_help(config: type) -> dict[str, str]:
    """The first paragraph of each field's docstring, as one line: what follows is for readers of the code."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docstring = ast.literal_eval(text.value)
            texts[field.target.id] = " ".join(docstring.partition("\n\n")[0].split()).replace("`", "")
    return texts


def parse_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """`1,3,5` to ascending numbers, each once; None stays None.

    Raises:
        ConfigError: If that is not what the text is.
    """
    if text is None:
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(f"{option} takes numbers such as 1,3,5; found {text!r}") from None
