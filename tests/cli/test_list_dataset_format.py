import json
from pathlib import Path
from unicodedata import east_asian_width

from xtuner.cli.app import main
from xtuner.cli.list_dataset_format import fold
from xtuner.data.formats import load_all

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


def test_lists_every_format_in_80_columns(capsys):
    assert main(["list-dataset-format"]) == 0
    out = capsys.readouterr().out
    blocks = out.split("\n\n")[:-1]
    assert [block.split("\n")[0] for block in blocks] == sorted(f.name for f in load_all())
    for block, format in zip(blocks, load_all(), strict=True):
        assert format.description in block
        row = block[block.index("\n  {") :]
        assert json.loads(row) == format.example
    wide = [sum(2 if east_asian_width(c) in "WF" else 1 for c in x) for x in out.splitlines()]
    assert max(wide) <= 80
    assert f"```text\n{out}```\n" in DOCS.read_text(encoding="utf-8"), "paste the list into it"


def test_fold_keeps_json_when_it_breaks_lines():
    value = {"a": [1, {"b": "x" * 30}, []], "c": {}, "d": None}
    lines = fold(value, width=20)
    assert len(lines) > 5 and json.loads("\n".join(lines)) == value
