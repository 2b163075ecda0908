import pyarrow as pa
import pytest

from s4v.errors import ConfigError
from s4v.retrieve.filters import filter_rows, find_columns

TABLE = pa.table(
    {
        "split": ["train", "val", "val", "test"],
        "duration_s": [3.0, 40.0, None, 8.0],
        "class_name": ["a = b", "run", None, "run"],
        "width": [320, 640, 320, 64],
    }
)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("split = 'val'", [0, 1, 1, 0]),
        ('split == "val" and duration_s < 50', [0, 1, 0, 0]),
        ("split <> 'val'", [1, 0, 0, 1]),
        ("split IN ('val', 'test') AND NOT width >= 640", [0, 0, 1, 1]),
        ("class_name = 'a = b'", [1, 0, 0, 0]),
        ("class_name not in ['run']", [1, 0, 0, 0]),
        ("(width > 320 or split = 'train') and duration_s > -1", [1, 1, 0, 0]),
        ("100 < width <= 320", [1, 0, 1, 0]),
        ("duration_s = duration_s", [1, 1, 0, 1]),
        ("split in ('validation')", [0, 0, 0, 0]),
        ("split in ('val')", [0, 1, 1, 0]),
        ("width not in (-1, 320)", [0, 1, 0, 1]),
        ("class_name = 'it''s'", [0, 0, 0, 0]),
        ("class_name <> 'it''s'", [1, 1, 0, 1]),
    ],
)
def test_conditions_choose_rows(where, expected):
    assert filter_rows(TABLE, where).astype(int).tolist() == expected


@pytest.mark.parametrize(
    "where",
    [
        "",
        "split",
        "split = ",
        "__import__('os').system('x') = 0",
        "split.upper() = 'VAL'",
        "1",
        "width + 1 = 2",
        "[x for x in y]",
    ],
)
def test_what_is_no_condition_is_refused(where):
    with pytest.raises(ConfigError, match="--where takes conditions such as \"split = 'val' and duration_s < 30\""):
        filter_rows(TABLE, where)


def test_unknown_columns_and_odd_comparisons_are_refused():
    assert find_columns("split = 'val' or width > 3", TABLE.column_names) == ["split", "width"]
    with pytest.raises(ConfigError, match="--where names colour; the columns are split, duration_s"):
        filter_rows(TABLE, "colour = 'red'")
    for where in ("width < 'wide'", "width = '320'", "split in (1, 2)", "split != 3"):
        with pytest.raises(ConfigError, match="compares what cannot be compared"):
            filter_rows(TABLE, where)
