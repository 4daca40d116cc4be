"""A run does not start if too many rows are lost."""

import pytest

from xtuner.data.report.data_report import (
    DataReport,
    PartReport,
    RowGroup,
    RowLocation,
    SourceReport,
)
from xtuner.errors import DataError


def report(lost, *, read=100, wanted=False):
    first = (RowLocation("rows.json", "line", 3),)
    groups = (RowGroup("has no answer", lost, first, wanted),) if lost else ()
    source = SourceReport("rows.json", 1, {"openai": 1}, True, read, read - lost, 0, groups, ())
    part = PartReport(1, 1, 1, 1, 1.0, 64)
    return DataReport((source,), part, None, 64, packed=True, duplicates=0)


@pytest.mark.parametrize(("lost", "limit"), [(5, 0.05), (0, 0.0), (100, 1.0)])
def test_up_to_the_limit_a_run_starts(lost, limit):
    report(lost).refuse_lost(limit)


def test_above_the_limit_reasons_and_options_are_listed():
    with pytest.raises(DataError) as told:
        report(6).refuse_lost(0.05)
    words = str(told.value)
    assert "6 of 100 rows cannot be used, 6.0%" in words and "has no answer (lines 3, ...)" in words
    assert "--set max_lost_rows=1" in words and "check-custom-dataset" in words


def test_rows_that_a_setting_drops_do_not_count():
    report(90, wanted=True).refuse_lost(0.05)
