"""How the clips of a step are shared out, and what a run that goes on makes of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from s4v.errors import ConfigError
from s4v.store.reader import open_store
from s4v.train.batches import StepShares, keep_recorded_batches, resolve_batches, warn_of_other_step
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.paper.presets import PRESETS, RETRIEVAL_RECIPE
from s4v.train.recipe import Recipe


def config(**options):
    return TrainConfig(features=Path("store/x.zarr"), out=Path("runs/x"), **options)


def recipe_of(name):
    return next(preset.recipe for preset in PRESETS if preset.name == name)


def share(name, processes=1, *, preset=None, **options):
    """What a preset comes to, named or (`preset="auto"`) found."""
    task = "retrieval" if name.endswith("msrvtt") else "recognition"
    given = config(preset=preset or name, task=task, **options)
    values = resolve_batches(given, recipe_of(name), name, processes)
    return StepShares(processes, given.accumulate, values["batch_size"], values["norm_clips"])


REFERENCE = {  # clips of a step, of a norm: 8 GPUs of the reference, one GPU's
    "b16-k400": (256, 32),
    "l14-ssv2": (256, 32),
    "e14-k400": (8, 1),
    "e14-ssv1": (128, 16),
    "b16-msrvtt": (128, 16),
}


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (8, 1), (1, 8), (2, 4), (4, 1), (2, 2)])
def test_a_preset_that_is_named_is_the_references_step_however_it_is_shared_out(name, processes, accumulate):
    shares = share(name, processes, accumulate=accumulate)
    assert (shares.clips, shares.norm_clips) == REFERENCE[name]
    assert not shares.crosses_processes, "a norm's clips lie in one process: nothing is exchanged"
    assert shares.learns_as(share(name))


def test_more_processes_than_the_references_count_a_norm_together():
    shares = share("b16-k400", 16)
    assert (shares.batch_size, shares.norm_clips, shares.processes_per_norm) == (16, 32, 2)
    assert shares.describe() == "256 clips a step: 16 processes of 16; batch norms count 32, of 2 processes"
    assert shares.describe(100, has_norms=False) == "256 clips a step: 16 processes of 16, of which an epoch has 100"
    assert share("b16-k400", accumulate=8).describe(256) == "256 clips a step: 8 batches of 32; batch norms count 32"


@pytest.mark.parametrize("processes", [1, 8])
def test_a_preset_that_was_found_keeps_its_clips_of_each_process(processes):
    assert share("b16-k400", processes, preset="auto") == StepShares(processes, 1, 32, 32)
    assert share("e14-ssv2", processes, preset="auto") == StepShares(processes, 1, 16, 16)
    assert share("b16-msrvtt", processes, preset="auto").clips == 128


def test_without_a_preset_a_norm_counts_a_batch_of_all():
    plain = resolve_batches(config(preset="none"), Recipe(30, 1e-3), None, 4)
    assert plain == {"batch_size": 32, "norm_clips": None}
    pairs = resolve_batches(config(preset="none", task="retrieval"), RETRIEVAL_RECIPE, None, 4)
    assert pairs == {"batch_size": 32, "norm_clips": None}


def test_clips_that_are_given_are_each_processs():
    assert share("b16-k400", 2, batch_size=64) == StepShares(2, 1, 64, 32)
    assert share("b16-k400", 2, batch_size=8) == StepShares(2, 1, 8, None), "no group of 32: all 16 are counted"
    assert share("b16-k400", 4, batch_size=8) == StepShares(4, 1, 8, 32), "of four processes"
    assert share("b16-k400", 1, batch_size=8, accumulate=4) == StepShares(1, 4, 8, None)
    assert share("b16-k400", 2, norm_clips=256).processes_per_norm == 2, "over all processes, if asked for"


@pytest.mark.parametrize(
    ("name", "processes", "options", "message"),
    [
        ("b16-k400", 3, {}, "a step of 256 clips cannot be shared out evenly among 3 processes: give --batch-size"),
        ("b16-k400", 1, {"accumulate": 3}, r"among 1 processes with 3 batches each \(--accumulate\)"),
        ("e14-k400", 16, {}, "a step of 8 clips cannot be shared out evenly among 16 processes"),
        (
            "b16-k400",
            1,
            {"accumulate": 16},
            "batch norms of b16-k400 count 32 clips; batches of 16 by one process make no such group. Batches that "
            "follow each other are never counted together. Take fewer of --accumulate, other .* --norm-clips 16",
        ),
        ("b16-k400", 2, {"norm_clips": 48}, r"batch norms \(--norm-clips\) count 48 clips; batches of 128 by 2 proc"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(name, processes, options, message):
    with pytest.raises(ConfigError, match=message):
        share(name, processes, **options)


def test_clips_of_a_norm_are_at_least_one():
    with pytest.raises(ConfigError, match="--norm-clips must be at least 1; found 0"):
        config(norm_clips=0)


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)])
def test_a_run_goes_on_with_its_own_step_under_another_number_of_processes(processes, accumulate):
    recorded = {"batch_size": 64, "processes": 2, "accumulate": 2, "norm_clips": 32}
    given = config(accumulate=accumulate, batch_size=64)
    shares = keep_recorded_batches(given, recorded, processes)
    assert (shares.clips, shares.norm_clips) == (256, 32)
    assert shares.learns_as(StepShares.of_run(recorded))


def test_a_run_from_before_keeps_its_norms():
    recorded = {"batch_size": 16, "processes": 2, "accumulate": 1}
    given = config(preset="b16-k400")
    assert keep_recorded_batches(given, recorded, 2) == StepShares(2, 1, 16, None)
    alone = keep_recorded_batches(given, recorded, 1)
    assert alone == StepShares(1, 1, 32, None) and alone.learns_as(StepShares.of_run(recorded))
    twice = keep_recorded_batches(replace(given, accumulate=2), recorded, 1)
    assert not twice.learns_as(StepShares.of_run(recorded)), "its norms would count half"


def test_a_run_does_not_go_on_with_another_step_or_where_it_cannot_be_shared_out():
    recorded = {"batch_size": 64, "processes": 2, "accumulate": 2, "norm_clips": 32}
    given = config(batch_size=32, accumulate=2)
    assert not keep_recorded_batches(given, recorded, 2).learns_as(StepShares.of_run(recorded))
    with pytest.raises(ConfigError, match="a step of 256 clips cannot be shared out evenly among 3 processes"):
        keep_recorded_batches(config(), recorded, 3)


def test_a_rate_that_is_not_of_this_step_is_told(caplog):
    recipe = recipe_of("b16-k400")

    def told(**options):
        given = config(**options)
        values = resolve_batches(given, recipe, "b16-k400", 1)
        resolved = replace(given, preset="b16-k400", learning_rate=given.learning_rate or 1e-3, **values)
        caplog.clear()
        warn_of_other_step(given, resolved, recipe, StepShares.of_config(resolved, 1).clips)
        return caplog.text

    assert "a step has 32 clips; the learning rate of b16-k400, 0.001, is of steps of 256 and is not scaled" in told()
    assert "--preset b16-k400 takes 256" in told()
    assert "a step has 64 clips" in told(preset="b16-k400", batch_size=64)
    assert told(preset="b16-k400") == told(learning_rate=1e-4) == ""
    assert told(preset="b16-k400", batch_size=32, accumulate=8) == "", "the same step by hand"


def test_what_a_step_is_made_of_is_said_before_it_begins(int8_store, tmp_path):
    said = []
    options = dict(features=int8_store, epochs=1, device="cpu", batch_size=4)
    train_run(TrainConfig(**options, out=tmp_path / "side", side_width=64, norm_clips=2), say=said.append)
    train_run(TrainConfig(**options, out=tmp_path / "probe", head="attentive", accumulate=3), say=said.append)
    reading = f"Tokens are read by: {open_store(int8_store).describe_reading()}"
    steps = ["4 clips a step; batch norms count 2", "12 clips a step: 3 batches of 4, of which an epoch has 8"]
    assert said == [steps[0], reading, steps[1], reading]
    with pytest.raises(ConfigError, match="--norm-clips has no effect on --head attentive, which has no batch norm"):
        train_run(TrainConfig(**options, out=tmp_path / "no", head="attentive", norm_clips=2))
    assert not (tmp_path / "no").exists()
