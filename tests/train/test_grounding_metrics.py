import json
from pathlib import Path

import numpy as np
import pytest

from s4v.train.tasks.grounding_metrics import (
    LENGTHS,
    MAP_THRESHOLDS,
    THRESHOLDS,
    measure_grounding,
)
from s4v.train.tasks.grounding_records import GroundingPrediction, GroundingTruth, parse_prediction, parse_truth

GOLDEN = json.loads((Path(__file__).parents[1] / "data/r2_tuning/metrics.json").read_text())


def read_case(case):
    predictions = [parse_prediction(row, "golden") for row in case["predictions"]]
    return predictions, [parse_truth(row, "golden") for row in case["truth"]]


def rename(result):
    """Figures of a golden result under our names; `brief` repeats what the others say."""
    figures = {}
    for part, own in result.items():
        if part.startswith("HL-min-"):
            level = part.removeprefix("HL-min-")
            figures |= {f"HL mAP {level}": own["HL-mAP"], f"HL HIT@1 {level}": own["HL-Hit1"]}
        elif part != "brief":
            prefix = "" if part == "full" else f"{part} "
            for kind, values in own.items():
                kind = kind.removeprefix("MR-")
                for at, value in values.items() if isinstance(values, dict) else [("average", values)]:
                    figures[prefix + (kind if at == "average" else f"{kind}@{at}")] = value
    return figures


def count(result):
    return sum(map(count, result.values())) if isinstance(result, dict) else 1


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_figures_are_the_evaluators_digits_and_all(case):
    predictions, truths = read_case(case)
    figures = measure_grounding(predictions, truths, "reference").list_figures()
    assert figures == rename(case["result"]["r2"])
    own = measure_grounding(predictions, truths, "moment_detr")
    stops = None in own.moments.values()
    assert stops == (case["result"]["moment_detr"] is None)
    if not stops:
        assert own.list_figures() == rename(case["result"]["moment_detr"])
