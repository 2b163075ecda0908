"""What answers in the small world are worth: shape, motion, pair of motions, and which way time runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..train.tasks.recognition_metrics import find_interval
from .scenes import PAIRS, REVERSED

_PAIR_OF = {motion: place for place, pair in enumerate(PAIRS) for motion in pair}


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """From 0 to 1; NaN of none."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share behind the count."""
        return find_interval(self.value, self.total)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        value = self.value if self.total else None
        return {"hits": self.hits, "total": self.total, "value": value, "interval": list(self.interval)}


def split_label(label: str) -> tuple[str, str]:
    """Shape and motion of a `shape_motion` label: `ring growing`."""
    shape, _, motion = label.partition(" ")
    return shape, motion


def judge_answers(labels: Sequence[str], answers: Sequence[str]) -> dict[str, Share]:
    """Take answers apart.

    Args:
        labels: `shape_motion` labels of videos.
        answers: What was said of each.

    Returns:
        both, shape, motion, pair (the motion or its reversal), and direction: of the answers that name the right
        pair, those that name the right one of its two.
    """
    parts = [(*split_label(label), *split_label(answer)) for label, answer in zip(labels, answers, strict=True)]
    in_pair = [(motion, said) for _, motion, _, said in parts if _PAIR_OF[motion] == _PAIR_OF[said]]
    return {
        "both": Share(sum(s == t and m == n for s, m, t, n in parts), len(parts)),
        "shape": Share(sum(s == t for s, _, t, _ in parts), len(parts)),
        "motion": Share(sum(m == n for _, m, _, n in parts), len(parts)),
        "pair": Share(len(in_pair), len(parts)),
        "direction": Share(sum(motion == said for motion, said in in_pair), len(in_pair)),
    }


def judge_reversal(labels: Sequence[str], forwards: Sequence[str], backwards: Sequence[str]) -> Share:
    """Of the videos answered right, those whose answer becomes the paired motion's when they are played backwards."""
    right = [(label, back) for label, answer, back in zip(labels, forwards, backwards, strict=True) if label == answer]
    turned = [back == reverse_label(label) for label, back in right]
    return Share(sum(turned), len(turned))


def reverse_label(label: str) -> str:
    """The label of the same video played backwards."""
    shape, motion = split_label(label)
    return f"{shape} {REVERSED[motion]}"


def describe_shares(shares: Mapping[str, Share]) -> dict[str, Any]:
    """For JSON."""
    return {name: share.describe() for name, share in shares.items()}
