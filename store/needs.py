"""What a network or a search needs of a store, as data; all that one lacks is told at once, with what makes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import StoreMismatchError
from .class_texts import has_current_class_texts
from .offsets import SEEN_FRAME, PixelOffset, describe_offsets
from .reader import StoreReader


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreNeeds:
    """What a network, or a search, needs of a store beside its rows."""

    arrays: tuple[str, ...] = ()
    """Of patches, cls, pixels and embedding: those that it reads."""
    pixel_offsets: tuple[int | str, ...] = (0,)
    """Of the pixels, where it reads them."""
    head: bool = False
    """The tower's end: the embedding as a projection of a norm of the class token."""
    text_tower: bool = False
    """Embeddings that texts lie beside."""
    class_texts: bool = False
    """Class names as that tower has them."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """By the name of a `Lack`: what can be done with a store that lacks it, as an order."""


NOTHING = StoreNeeds()


@dataclass(frozen=True, slots=True)
class Lack:
    """One thing that a store does not have."""

    name: str
    """`cls`, `pixels`, `offsets`, `head`, `text_tower` or `class_texts`."""
    why: str
    """What it is, and why it is not there."""
    options: tuple[str, ...]
    """Of `s4v extract`, that make a store with it."""
    without: tuple[str, ...] = ()
    """Options that must be left out for it."""


def find_lacks(store: StoreReader, needs: StoreNeeds) -> list[Lack]:
    """All that a store does not have of what is needed."""
    return list(_find_lacks(store, needs))


def _find_lacks(store: StoreReader, needs: StoreNeeds) -> Iterator[Lack]:
    backbone = store.facts.backbone
    other_model = ("--model", "vit-b16")
    if "cls" in needs.arrays and store.layout.class_tokens == "none":
        yield Lack("cls", f"class tokens (`cls`): {backbone.name} has none", ("--cls", "mean"))
    if "cls" in needs.arrays and needs.head and store.layout.class_tokens == "mean":
        yield Lack("cls", "class tokens of the tower's own: `cls` holds means of patch tokens", (), ("--cls mean",))
    if "pixels" in needs.arrays and not store.layout.with_pixels:
        yield Lack("pixels", "`pixels`: it was extracted with --no-pixels", _offset_options(needs), ("--no-pixels",))
    elif "pixels" in needs.arrays:
        own, read = store.layout.pixel_offsets, tuple(map(PixelOffset.of, needs.pixel_offsets))
        if missing := [offset for offset in read if offset not in own]:
            why = f"pixels at offsets {describe_offsets(missing)} from its frames: it holds {describe_offsets(own)}"
            yield Lack("offsets", why, _offset_options(needs, own))
    if needs.head and not store.has_head:
        why = f"`head`: the embedding of {backbone.name} is no projection of a norm of its class token"
        yield Lack("head", why, other_model)
    if needs.text_tower and not backbone.has_text_tower:
        yield Lack("text_tower", f"a text tower: there is none beside {backbone.name}", other_model)
    elif needs.class_texts and not has_current_class_texts(store):
        why = "`text/classes`: the names of its classes, as the text tower has them"
        yield Lack("class_texts", why, ("--class-template", "{}"))


def _offset_options(needs: StoreNeeds, own: Sequence[PixelOffset] = ()) -> tuple[str, ...]:
    """Of `s4v extract`, for pixels at these offsets beside those that a store has; none for frames alone."""
    offsets = {*map(PixelOffset.of, needs.pixel_offsets), *own}
    return () if offsets == {SEEN_FRAME} else ("--pixel-offsets", describe_offsets(tuple(offsets)))


def require_needs(store: StoreReader, needs: StoreNeeds, who: str) -> None:
    """Refuse a store that lacks what is needed, before anything of it is read; all that it lacks in one message.

    Args:
        store: It is opened, no more.
        needs: Of whoever will read it.
        who: For the message: `--head side4video`.

    Raises:
        StoreMismatchError: With what is lacking, what else can be done, and the command that makes such a store.
    """
    lacks = find_lacks(store, needs)
    if not lacks:
        return
    orders = list(dict.fromkeys(order for lack in lacks if (order := needs.instead.get(lack.name))))
    instead = f" {' '.join(f'{order[0].upper()}{order[1:]}.' for order in orders)}" if orders else ""
    raise StoreMismatchError(
        f"{store.path} lacks what {who} reads: {'; '.join(lack.why for lack in lacks)}.{instead} "
        f"A store that has {'them' if len(lacks) > 1 else 'it'}: {describe_command(store, lacks)}"
    )


def describe_command(store: StoreReader, lacks: list[Lack]) -> str:
    """The `s4v extract` line of a store like this one that lacks nothing, as far as the store knows its own."""
    facts = store.facts
    changes = [option for lack in lacks for option in lack.options]
    given = dict(zip(changes[::2], changes[1::2], strict=True))
    model = given.pop("--model", None)
    # With another model the class tokens are its own.
    if model is not None:
        given.pop("--cls", None)
    options = {"--model": model or facts.backbone.name}
    if model is None:
        options["--weights"] = facts.backbone.weights
    options["--dataset"] = facts.dataset.name
    if facts.dataset.root is not None:
        options["--root"] = facts.dataset.root
    if facts.dataset.protocol is not None:
        options["--protocol"] = facts.dataset.protocol
    left_out = sorted({option for lack in lacks for option in lack.without})
    if store.layout.class_tokens == "mean" and model is None and "--cls mean" not in left_out:
        options["--cls"] = "mean"
    line = " ".join(f"{name} {shlex.quote(str(value))}" for name, value in {**options, **given}.items())
    more = f", without {', '.join(left_out)}" if left_out else ""
    return f"`s4v extract {line} --out NEW.zarr`, and whatever else you gave{more}."
