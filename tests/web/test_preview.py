"""What the page shows before a run: data, bad rows, methods."""

import re

from xtuner import i18n
from xtuner.web import form, preview

WORDS = i18n.words("en")


def test_data_as_understood(site, folder, monkeypatch):
    monkeypatch.setattr(preview, "METHODS", ("lora",))  # each forecast takes seconds
    values = preview.starting_values(str(folder / "tiny"), "lora")
    values |= {"data_path": [str(folder / "rows.jsonl")], "dataset_format": ["auto"]}
    values |= {"max_length": 64, "dataset_num_proc": 1}
    loaded = form.checked(values, site.folders)
    view = preview.look_at_data(loaded, WORDS)
    assert re.search(
        r"openai.*?</td>(<td class=.number.>14</td>)(<td class=.number.>12</td>)", view.html
    )
    assert "line 13" in view.html and "add one or remove the row" in view.html
    assert '<span class="on">I am Ada &lt;b&gt;.' in view.html and "<b>" not in view.html
    assert view.questions == ("Who are you, 0?", "Who are you, 1?")
    suggestion = preview.suggested(values, view)
    assert suggestion["max_epochs"] == suggestion["accumulative_counts"] == "auto"
    assert view.steps >= 15 and view.steps % 15 == 0  # 12 rows are repeated 15 times
    assert suggestion["save_steps"] == suggestion["evaluation_freq"] == view.steps // 5
    assert suggestion["max_lost_rows"] == 1
    form.checked(suggestion, site.folders)
    methods = preview.methods(loaded)
    assert [(method.tuning, method.fits) for method in methods] == [("lora", True)]
    assert 0 < methods[0].peak < methods[0].available
