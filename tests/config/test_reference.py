"""The output of `xtuner explain`, and the reference page in docs, which matches the schema."""

from pathlib import Path

from xtuner.config import explain
from xtuner.config.schema import Settings, field_parts

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_reference_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == explain.page(), (
        "run: python -m xtuner.config.explain > docs/settings.md"
    )


def test_every_setting_is_explained():
    table = explain.table()
    for name in Settings.model_fields:
        assert Settings.model_fields[name].description, name
        assert f"\n{name} " in explain.explain(name).replace(f"{name}\n", f"\n{name} ", 1)
        assert f"  {name} " in table


def test_the_parts_hold_every_setting_once():
    assert sorted(field_parts()) == sorted(Settings.model_fields)
