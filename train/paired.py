"""Two runs on the same videos: how far apart they are, with an interval that counts each video in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import StoreMismatchError

_DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Answers:
    """Which questions a run answered right: one a video in recognition, one a caption in retrieval."""

    figure: str
    """What the share of right answers is called: top1, r1."""
    videos: tuple[str, ...]
    """(q,) whose question it is."""
    is_right: np.ndarray
    """(q,) 0 or 1, or a mean of several trainings."""

    def sum_by_video(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The videos, sorted, and of each the right answers and the questions: (n, 2)."""
        names, places = np.unique(np.asarray(self.videos), return_inverse=True)
        right = np.bincount(places, weights=self.is_right, minlength=len(names))
        return tuple(names.tolist()), np.stack([right, np.bincount(places, minlength=len(names))], axis=1)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one run is above another."""

    other: str
    """The one that it is compared with."""
    figure: str
    difference: float
    """Its share minus the other's."""
    interval: tuple[float, float]
    """95 %, paired, over videos."""
    videos: int


def average_answers(trainings: Sequence[Answers]) -> Answers:
    """The mean of several trainings of one thing, question by question."""
    first = trainings[0]
    if any(one.videos != first.videos for one in trainings):
        raise StoreMismatchError("trainings of one thing were evaluated on different videos")
    return Answers(first.figure, first.videos, np.mean([one.is_right for one in trainings], axis=0))


def find_difference(ours: Answers, theirs: Answers, other: str, *, seed: int = 0) -> Difference:
    """The difference of two shares, with the percentile interval of a paired bootstrap over videos.

    Videos are drawn, and with each of them all its questions, in both runs alike.

    Raises:
        StoreMismatchError: If the two were not asked the same.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    (videos, right), (their_videos, their_right) = ours.sum_by_video(), theirs.sum_by_video()
    if (ours.figure, videos) != (theirs.figure, their_videos) or (right[:, 1] != their_right[:, 1]).any():
        raise StoreMismatchError(
            f"runs can be compared on the same questions alone: {ours.figure} of {len(videos)} videos here, "
            f"{theirs.figure} of {len(their_videos)} in {other}. Evaluate both on one split of one store."
        )
    # Videos with the same answers are one kind: how often each kind is drawn is one multinomial draw.
    kinds, counts = np.unique(
        np.column_stack([right[:, 0] - their_right[:, 0], right[:, 1]]), axis=0, return_counts=True
    )
    drawn = np.random.default_rng(seed).multinomial(len(videos), counts / len(videos), size=_DRAWS)
    above, questions = drawn @ kinds[:, 0], drawn @ kinds[:, 1]
    low, high = np.percentile(above / questions, [2.5, 97.5])
    difference = float(counts @ kinds[:, 0] / (counts @ kinds[:, 1]))
    return Difference(other, ours.figure, difference, (float(low), float(high)), len(videos))
