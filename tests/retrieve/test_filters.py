import ast
import re

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
        ("class_name IS NULL", [0, 0, 1, 0]),
        ("duration_s is not null and split = 'val'", [0, 1, 0, 0]),
        ("duration_s is None", [0, 0, 1, 0]),
        # A missing value fulfils no comparison, so the opposite of one is fulfilled.
        ("not duration_s < 10", [0, 1, 1, 0]),
        ("class_name not in ('run') or class_name != 'run'", [1, 0, 0, 0]),
        ("3 <= duration_s < 40", [1, 0, 0, 1]),
        ("split in ()", [0, 0, 0, 0]),
        ("width = 320.0", [1, 0, 1, 0]),
        ('class_name = "a = b"', [1, 0, 0, 0]),
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
        "1 = 1",
        "not " * 100_000 + "width = 3",
        "(" * 300 + "width = 3" + ")" * 300,
        "width = 3\0",
        "split = r'val'",
        "split = f'{width}'",
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


@pytest.mark.parametrize("depth", range(400, 1000, 40))
def test_however_deep_there_is_an_answer_or_a_refusal(depth):
    try:
        assert filter_rows(TABLE, "not " * depth + "width = 320").tolist() == [True, False, True, False]
    except ConfigError as error:
        assert "--where takes conditions such as" in str(error)


def test_what_is_not_meant_that_way_is_told():
    for where, message in (
        ("split = ('val', 'train')", "several values go with `in`"),
        ("class_name = None", "nothing equals a missing value; write `is null` or `is not null`"),
        ("class_name != null", "nothing equals a missing value"),
        ("width is 3", "`is` goes with null alone"),
        ("'va' in split", "`in` wants a column, and values such as"),
        ("width = True", "True with numbers"),
        ("split = width", "texts with numbers"),
        ("times = 3", "times holds neither texts nor numbers"),
        (f"width < 1{'0' * 400}", "int too large to convert to float"),
    ):
        with pytest.raises(ConfigError, match="compares what cannot be compared: .*" + re.escape(message)):
            filter_rows(TABLE.append_column("times", [[[1.0]] * 4]), where)


def test_a_backslash_means_itself():
    table = pa.table({"path": [r"a\b.mp4", r"c\'d.mp4", "a\b.mp4"]})
    assert filter_rows(table, r"path = 'a\b.mp4'").tolist() == [True, False, False]
    assert filter_rows(table, r"path = 'c\''d.mp4'").tolist() == [False, True, False]
    assert filter_rows(table, r"path in ('a\b.mp4', 'x\')").tolist() == [True, False, False]


def test_a_million_rows_take_no_loop(monkeypatch):
    """Literals are read once a condition, not once a row; chunks of a table may lie anywhere."""
    read = []
    monkeypatch.setattr(ast, "literal_eval", lambda node, f=ast.literal_eval: read.append(node) or f(node))
    table = pa.concat_tables([TABLE] * 50)
    found = filter_rows(table, "split = 'val' and duration_s < 50 or width in (64, 1)")
    assert found.dtype == bool and found.tolist() == [False, True, False, True] * 50
    assert len(read) == 4
