"""Users' classes and functions: what does not fit is named with its file before the run."""

import inspect
import sys
from pathlib import Path

import pytest

from xtuner import plugins
from xtuner.algorithms.base import BaseAlgorithm
from xtuner.engine.hooks.base import BaseHook
from xtuner.errors import ConfigError

HOOK = "from xtuner.engine.hooks.base import BaseHook\nclass H(BaseHook):\n"
ALGORITHM = "from xtuner.algorithms.base import BaseAlgorithm\nclass H(BaseAlgorithm):\n"


def loaded(folder, text, base):
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(text)
    return plugins.load_user_class("own.py:H", base, setting="custom_hooks", folder=folder)


WRONG = {
    "no run": (
        "    def on_step(self): pass",
        r"H.on_step\(self, run\) is called, but too many .*3\)$",
    ),
    "init": (
        "    def __init__(self, every): pass",
        "H is created like BaseHook.*, but missing .*'every'.*line 3",
    ),
    "plural": ("    def on_steps(self, run): pass", "no such method; did you mean 'on_step'"),
    "other event": ("    def on_train_end(self, run): pass", "no such method; it has close, on_e"),
    "no method": ("    on_end = None", "H.on_end is None; it must be a method$"),
    "no model": ("    def loss(self, batch): pass", r"H.loss\(self, model, batch\) is called"),
    "no collate": ("    collate = None", "H.collate is None; it must be a method"),
    "typo": ("    def losss(self, model, batch): pass", "did you mean 'loss'"),
    "no batch": (
        "    @staticmethod\n    def count(): pass",
        r"H.count\(self, batch\) is called, but too many .*3\)$",
    ),
    "on the class": ("    def check(self, settings): pass", r"H.check\(settings\) is .* missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_methods_that_do_not_fit_are_named(tmp_path, case):
    body, words = WRONG[case]
    hook = list(WRONG).index(case) < 5
    text = (HOOK if hook else ALGORITHM) + body + "\n"
    with pytest.raises(ConfigError, match=rf"custom_hooks = 'own.py:H': .*{words}"):
        loaded(tmp_path, text, BaseHook if hook else BaseAlgorithm)


def test_other_classes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a subclass of xtuner"):
        loaded(tmp_path, "class H: pass\n", BaseHook)


def test_methods_that_fit_are_taken(tmp_path):
    body = (
        "    def __init__(self, settings): pass\n"
        "    def loss(self, model, *rest): pass\n"
        "    def count(self, batch, extra=1): pass\n"
        "    def encode(self, row, encoder): pass\n"
        "    def helper(self, a, b, c): pass\n"
    )
    assert issubclass(loaded(tmp_path, ALGORITHM + body, BaseAlgorithm), BaseAlgorithm)
    body = "    def __init__(self, every=3): pass\n    def on_step(self, /, run): pass\n"
    assert issubclass(loaded(tmp_path / "hook", HOOK + body, BaseHook), BaseHook)


RIGHT = {
    "static": "    @staticmethod\n    def count(batch): pass",
    "class": "    @classmethod\n    def count(cls, batch): pass",
    "cached": "    @functools.cache\n    def count(self, batch): pass",
    "partial": "    def both(self, extra, batch): pass\n"
    "    count = functools.partialmethod(both, 1)",
    "unknown": "    count = staticmethod(dict.update)",
    "other arguments": "    def counts(self): pass\n    def collated(self, a, b, c): pass",
    "both": "    def count(self, batch): pass\n    def counts(self, batch): pass",
    "called": "    def losses(self, model, batch): pass\n"
    "    def loss(self, model, batch): return self.losses(model, batch)\n"
    "    def collates(self, samples): pass\n"
    "    def count(self, batch): return self.collates(batch)",
    "nested": "    class encoder: pass",
}


@pytest.mark.parametrize("case", RIGHT)
def test_own_helpers_and_other_kinds_of_methods_are_taken(tmp_path, case):
    assert loaded(tmp_path, f"import functools\n{ALGORITHM}{RIGHT[case]}\n", BaseAlgorithm)


def test_helpers_of_hooks_are_taken(tmp_path):
    body = (
        "    def on_main(self): pass\n"
        "    def on_each(self, run): pass\n"
        "    def on_step(self, run): self.on_each(run)\n"
    )
    assert loaded(tmp_path, HOOK + body, BaseHook)


def test_errors_of_packages_below_a_users_folder_are_not_the_users(tmp_path, monkeypatch):
    """A user's file may lie in the folder that holds xtuner, a virtual environment or Python."""
    monkeypatch.setattr(plugins, "_OWN", tmp_path / "src" / "xtuner")
    monkeypatch.setattr(plugins, "_STANDARD_LIBRARY", (tmp_path / "python/lib",))
    others = ("src/xtuner/core.py", "venv/site-packages/lib.py", "python/lib/json.py")
    for path in (*others, "own.py", "near/helper.py"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("def f(*args):\n    return 1 / 0\n")
    act = plugins.load_user_object("own.py:f", setting="s", folder=tmp_path)
    assert "own.py line 2" in location(act)
    for path, users in [*((path, False) for path in others), ("near/helper.py", True)]:
        code = compile((tmp_path / path).read_text(), str(tmp_path / path), "exec")
        names = {}
        exec(code, names)
        assert bool(location(names["f"])) is users, path


def test_the_standard_library_is_known():
    assert Path(inspect.__file__).parent in plugins._STANDARD_LIBRARY


def location(function):
    try:
        function()
    except ZeroDivisionError as error:
        return plugins.user_location(error)


def test_a_function_that_cannot_be_called_is_named_with_its_file(tmp_path):
    (tmp_path / "own.py").write_text("\ndef f(row, tokenizer):\n    return []\n")
    act = plugins.load_user_object("own.py:f", setting="s", folder=tmp_path)
    with pytest.raises(TypeError) as caught:
        act({})
    told = plugins.described(caught.value, of=act)
    assert told.endswith(f"'tokenizer' ({tmp_path / 'own.py'} line 2)")
    assert Path(sys.modules[act.__module__].__file__) == tmp_path / "own.py"
