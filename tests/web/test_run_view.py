"""Runs as the page shows them."""

from xtuner import i18n
from xtuner.web.run_view import view


def test_a_run_and_two_compared(site):
    words = i18n.words("zh")
    one = view(site.jobs, site.folders, ["ada"], words)
    assert "已完成" in one and "2 / 2" in one and "<svg" in one
    two = view(site.jobs, site.folders, ["ada", "bob"], words)
    assert two.count("<polyline") == 2 and two.count('class="badge finished"') == 2
    assert words("runs_none") in view(site.jobs, site.folders, ["../x"], words)
