import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.train.ranking import apply_dual_softmax, measure_retrieval, rank_texts, rank_videos

TABLE = np.array(
    [
        # videos: 0    1    2    3 (nobody describes it)
        [0.9, 0.1, 0.2, 0.0],  # of 0: first
        [0.5, 0.5, 0.1, 0.1],  # of 0: tied with 1, so second
        [0.3, 0.2, 0.8, 0.9],  # of 1: last
        [0.0, 0.1, 0.4, 0.6],  # of 2: second
    ]
)
OWNERS = np.array([0, 0, 1, 2])


def test_a_table_that_was_ranked_by_hand():
    assert rank_videos(TABLE, OWNERS).tolist() == [1, 2, 4, 2]
    # Video 0 finds a text of its own first. Video 1's text (0.2) is behind 0.5. Video 2's (0.4) is behind 0.8.
    assert rank_texts(TABLE, OWNERS).tolist() == [1, 2, 2]
    figures = measure_retrieval(TABLE, OWNERS)
    there, back = figures["text_to_video"], figures["video_to_text"]
    assert (there.queries, back.queries) == (4, 3)
    assert there.recall == {1: 0.25, 5: 1.0, 10: 1.0} and back.recall[1] == pytest.approx(1 / 3)
    assert (there.median_rank, there.mean_rank) == (2.0, 2.25)


def test_ties_and_nan_count_against_us():
    assert rank_videos(np.zeros((2, 5)), np.array([0, 4])).tolist() == [5, 5], "no query twice, none for nothing"
    scores = TABLE.copy()
    scores[0, 1] = np.nan
    assert rank_videos(scores, OWNERS)[0] == 2
    scores[0] = np.nan
    assert rank_videos(scores, OWNERS)[0] == 4
    assert rank_texts(np.zeros((4, 3)), np.array([0, 0, 1, 2])).tolist() == [3, 4, 4]


@given(
    seed=st.integers(0, 10**6),
    texts=st.integers(1, 30),
    videos=st.integers(1, 12),
    levels=st.sampled_from([2, 5, 1000]),
)
def test_ranks_are_what_counting_one_by_one_gives(seed, texts, videos, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (texts, videos)) / levels
    owners = rng.integers(0, videos, texts)
    for text, rank in enumerate(rank_videos(scores, owners)):
        others = [v for v in range(videos) if v != owners[text]]
        assert rank == 1 + sum(scores[text, v] >= scores[text, owners[text]] for v in others)
    captioned = sorted(set(owners.tolist()))
    for video, rank in zip(captioned, rank_texts(scores, owners), strict=True):
        best = max(scores[t, video] for t in range(texts) if owners[t] == video)
        assert rank == 1 + sum(scores[t, video] >= best for t in range(texts) if owners[t] != video)


def test_dual_softmax_prefers_the_text_that_wants_a_video_most():
    scores = np.array([[0.50, 0.49], [0.60, 0.30]])
    plain, dual = (rank_videos(s, np.array([1, 0])) for s in (scores, apply_dual_softmax(scores)))
    assert plain.tolist() == [2, 1] and dual.tolist() == [1, 1]
    assert (apply_dual_softmax(scores).sum(axis=0) <= scores.max(axis=0) + 1e-12).all()
