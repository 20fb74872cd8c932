"""Conditions on measurements: what they keep, and that they are never run as code."""

import io

import numpy as np
import pandas
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv

from darcnn.runtime.errors import UsageError
from darcnn.runtime.row_filter import parse_filter

TABLE = pa.table(
    {
        "area_px": pa.array([5, 30, 80], pa.int64()),
        "area_um2": pa.array([None, None, 4.0], pa.float64()),
        "score": pa.array([0.9, 0.5, 0.7], pa.float32()),
        "mean_intensity_R": pa.array([10.0, 100.0, 200.0], pa.float32()),
        "mean_intensity_G": pa.array([30.0, 120.0, 220.0], pa.float32()),
        "truncated": pa.array([False, True, False]),
    }
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("area_px > 20", [False, True, True]),
        ("20 < area_px <= 30", [False, True, False]),
        ("area_px > 20 and score >= 0.6", [False, False, True]),
        ("area_px < 6 or not score < 0.6", [True, False, True]),
        ("mean_intensity < 115", [True, True, False]),
        ("mean_intensity_G - mean_intensity_R == 20", [True, True, True]),
        ("area_px * 2 / 10 > 1 + -0.5", [True, True, True]),
        ("area_um2 < 10", [False, False, True]),  # what is not known satisfies nothing
        ("not truncated", [True, False, True]),
        ("(area_px != 5)", [False, True, True]),
    ],
)
def test_a_condition_keeps_the_rows_that_satisfy_it(text, kept):
    found = parse_filter(text, TABLE.column_names).keep(TABLE)
    assert found.dtype == np.bool_
    assert found.tolist() == kept
    assert parse_filter(text, TABLE.column_names).keep(TABLE.slice(0, 0)).shape == (0,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "area_px",
        "area_px >",
        "area_px > 'a'",
        "area_px > True",
        "__import__('os').system('x') > 1",
        "area_px.real > 1",
        "area_px[0] > 1",
        "(lambda: 1) > 0",
        "[x for x in area_px] > 1",
        "area_px ** 99 > 1",
        "area_px in (1, 2)",
        "area_px > 1; score > 1",
        "score := 1",
    ],
)
def test_all_else_is_refused(text):
    with pytest.raises(UsageError, match="--filter"):
        parse_filter(text, TABLE.column_names)


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="no column perimeter; use area_px"):
        parse_filter("perimeter > 3", TABLE.column_names)
    with pytest.raises(UsageError, match="no column std_intensity"):
        parse_filter("std_intensity > 3", TABLE.column_names)


@pytest.mark.parametrize(
    "text",
    [
        "id <= 5",
        "geometry > 1",
        "area_px - (area_px > 3) > 0",
        "(area_px > 20) - (area_px > 40) > 0",
        "area_px > 1 and 3",
        "(1 < 2) < area_px",
        "-(area_px > 2)",
        "area_px > " + "9" * 400,
    ],
)
def test_what_is_no_condition_on_measurements_is_refused(text):
    with pytest.raises(UsageError, match="--filter"):
        parse_filter(text, ["id", "geometry", "area_px"])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("1 == 1 and area_px > 20", [False, True, True]),
        ("0 < 1 < area_px", [True, True, True]),
        ("area_px > 1/0", [False, False, False]),
        ("1 > 0", [True, True, True]),
        ("mean_intensity_a > 20", [False, True, False]),
        ("not mean_intensity_a > 20", [True, False, False]),  # of what is not known neither holds
        ("not 50 > mean_intensity_a", [False, True, False]),
        ("mean_intensity_a != 10", [False, True, False]),
        ("not (mean_intensity_a > 20 or area_px > 25)", [True, False, False]),
        ("mean_intensity_a > 20 or area_px > 35", [False, True, True]),
        ("not (mean_intensity_a <= 20 and area_px < 40)", [False, True, True]),
    ],
)
def test_conditions_hold_row_by_row_and_never_by_what_is_not_known(text, kept):
    table = pa.table({"area_px": [5, 30, 40], "mean_intensity_a": [10.0, 90.0, None]})
    assert parse_filter(text, table.column_names).keep(table).tolist() == kept


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=20),
    st.integers(0, 1000),
    st.sampled_from(["<", "<=", "==", "!=", ">=", ">"]),
)
def test_a_condition_holds_for_what_stands_in_the_csv(thousandths, limit, sign):
    table = pa.table({"score": pa.array(np.array(thousandths) / 1000, pa.float32())})
    text, written = f"score {sign} {limit / 1000}", io.BytesIO()
    csv.write_csv(table, written)
    expected = pandas.read_csv(io.BytesIO(written.getvalue())).eval(text)
    assert parse_filter(text, table.column_names).keep(table).tolist() == expected.tolist()
