import json
from dataclasses import replace

import pytest

from s4v.demo.pipeline import run_demo
from s4v.demo.scores import Share
from s4v.demo.world import WorldConfig
from s4v.errors import ConfigError, RunExistsError

TINY = WorldConfig(num_train=8, num_val=4, num_novel=2)


def test_small_demo_writes_a_report_and_never_clears_a_foreign_folder(tmp_path):
    out = tmp_path / "demo"
    result = run_demo(out, world=TINY, epochs=1, seeds=2, full=True)
    methods = result["methods"]
    strict = json.loads((out / "demo.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["finished"] and strict["methods"] == methods
    assert set(methods) == {"side network", "linear probe", "pixels only", "tokens only", "zero-shot"}
    assert [len(method["top1_by_seed"]) for method in methods.values()] == [2, 2, 2, 2, 1]
    assert all(method["both"]["total"] == 4 for method in methods.values())
    assert set(result["novel"]) == set(methods)
    assert set(result["retrieval"]) == {"trained", "frozen"}
    assert result["retrieval"]["trained"]["text_to_video"]["queries"] == 12
    assert result["retrieval"]["trained"]["reversed"]["total"] == 4
    report = (out / "report.html").read_text()
    assert "://" not in report, "self-contained"
    for text in ("side network", "linear probe", "pixels only", "tokens only", "zero-shot", "backwards", "R@10"):
        assert text in report
    for text in ("data:image/png;base64", ", predicted ", "Novel combinations", "a ring moves left", " MB"):
        assert text in report
    assert set(result["seconds_by_stage"]) >= {"generate", "extract", "train side network", "retrieve"}
    again = run_demo(out, world=replace(TINY, num_novel=0), epochs=1)
    assert again["novel"] == {} and "Novel" not in (out / "report.html").read_text()
    assert set(again["methods"]) == {"side network", "linear probe"}
    assert "pixels only" not in (out / "report.html").read_text()
    assert again["methods"]["side network"]["top1_by_seed"] == methods["side network"]["top1_by_seed"][:1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    (tmp_path / "mine/demo.json").write_text('{"my": 1}')
    with pytest.raises(RunExistsError, match="not an earlier demo"):
        run_demo(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").read_text() == "x"


def test_a_demo_needs_a_seed_and_videos(tmp_path):
    with pytest.raises(ConfigError, match="--seeds must be at least 1; found 0"):
        run_demo(tmp_path / "demo", seeds=0)
    with pytest.raises(ConfigError, match="needs 2 training videos and 1 held-out one; found 8 and 0"):
        run_demo(tmp_path / "demo", world=replace(TINY, num_val=0))
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_demo_shows_what_it_claims(tmp_path):
    """At the usual difficulty, as `s4v demo --full` runs it."""
    result = run_demo(tmp_path / "demo", full=True)
    methods = result["methods"]
    side = methods["side network"]["both"]["value"]
    assert 0.80 <= side <= 0.95
    assert methods["pixels only"]["both"]["value"] <= side - 0.15
    told = [shares["linear probe"]["direction"] for shares in (methods, result["novel"])]
    blind = Share(*(sum(one[part] for one in told) for part in ("hits", "total")))
    assert blind.total >= 60
    assert blind.interval[0] <= 0.5 <= blind.interval[1]
    assert result["reversal"]["value"] >= 0.8
    trained, frozen = result["retrieval"]["trained"], result["retrieval"]["frozen"]
    assert trained["text_to_video"]["r1"] >= 2 * frozen["text_to_video"]["r1"]
    assert trained["reversed"]["value"] >= 0.9
    low, high = frozen["reversed"]["interval"]
    assert low <= 0.5 <= high
