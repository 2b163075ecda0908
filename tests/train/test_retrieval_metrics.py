import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.train.tasks.retrieval_metrics import apply_dual_softmax, measure_retrieval, rank_texts, rank_videos

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
    assert rank_videos(scores, OWNERS)[0] == 5, "not even last"
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


def test_dual_softmax_prefers_the_query_that_wants_a_candidate_most():
    scores, owners = np.array([[0.50, 0.49], [0.60, 0.30]]), np.array([1, 0])
    plain, dual = (rank_videos(s, owners) for s in (scores, apply_dual_softmax(scores, queries="texts")))
    assert plain.tolist() == [2, 1] and dual.tolist() == [1, 1]
    # The same table the other way round: now it is the videos that look for texts.
    plain, dual = (rank_texts(s, owners) for s in (scores.T, apply_dual_softmax(scores.T, queries="videos")))
    assert plain.tolist() == [2, 1] and dual.tolist() == [1, 1]
    both = measure_retrieval(scores.T, owners, with_dual_softmax=True)
    assert both["video_to_text"].mean_rank == 1.0
    assert measure_retrieval(scores, owners, with_dual_softmax=True)["text_to_video"].mean_rank == 1.0


def test_dual_softmax_keeps_the_order_of_negative_scores():
    scores = np.array([[-0.05, -0.3], [-0.4, -0.1]])
    for queries in ("texts", "videos"):
        assert rank_videos(apply_dual_softmax(scores, queries=queries), np.array([0, 1])).tolist() == [1, 1]
        # A score that is lower for everybody alike changes no rank.
        moved = apply_dual_softmax(scores - 0.5, queries=queries) + 0.5
        np.testing.assert_allclose(moved, apply_dual_softmax(scores, queries=queries), atol=1e-12)


@given(seed=st.integers(0, 10**6), texts=st.integers(1, 12), videos=st.integers(1, 12), as_float32=st.booleans())
def test_dual_softmax_is_what_its_formula_says(seed, texts, videos, as_float32):
    scores = np.random.default_rng(seed).uniform(-1, 1, (texts, videos)).astype(np.float32 if as_float32 else float)
    dual = apply_dual_softmax(scores, queries="texts")
    for text in range(texts):
        for video in range(videos):
            share = np.exp(100 * np.longdouble(scores[text, video]))
            share /= np.exp(100 * scores[:, video].astype(np.longdouble)).sum()
            assert dual[text, video] == pytest.approx(float(np.log(np.exp(np.longdouble(scores[text, video])) * share)))
    np.testing.assert_array_equal(apply_dual_softmax(scores.T, queries="videos"), dual.T)
