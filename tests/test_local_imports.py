"""A user's Python file and the modules that it imports from its own folder."""

import sys

import pytest

from xtuner.errors import ConfigError
from xtuner.local_imports import local_imports
from xtuner.plugins import load_user_object

FILES = {
    "mine.py": "import json, alone\nfrom pack import words\ndef late():\n    import later\n",
    "alone.py": "import other.deep.one\n",
    "later.py": "import mine\n",
    "unused.py": "",
    "json.py": "",
    "pack/__init__.py": "from .inner import A\n",
    "pack/words.py": "from . import more\nfrom ..mine import x\n",
    "pack/inner.py": "A = 1\n",
    "pack/more.py": "def broken(:\n",
    "other/deep/one.py": "import outside\n",
}


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "mine.py"


def test_modules_of_the_folder_are_found_without_running_them(tmp_path):
    file = write(tmp_path / "here", FILES)
    (tmp_path / "outside.py").write_text("")
    (tmp_path / "here" / "outside.py").symlink_to(tmp_path / "outside.py")
    found = local_imports(file)
    assert list(found) == [
        "alone", "json", "later", "other.deep.one", "pack", "pack.inner", "pack.more", "pack.words",
    ]  # fmt: skip
    assert all(path.is_file() for path in found.values())


def test_each_file_imports_from_its_own_folder(tmp_path):
    late = "def late():\n    import later_of_mine\n    return later_of_mine.V\n"
    text = f"from helper_of_mine import VALUE\n{late}"
    values = []
    for name in ("a", "b"):
        files = {"mine.py": text, "helper_of_mine.py": f"VALUE = {name!r}\n",
                 "later_of_mine.py": f"V = {name!r}\n"}  # fmt: skip
        write(tmp_path / name, files)
        loaded = {n: load_user_object(f"mine.py:{n}", setting="s", folder=tmp_path / name)
                  for n in ("VALUE", "late")}  # fmt: skip
        values += [loaded["VALUE"], loaded["late"]()]
    assert values == ["a", "a", "b", "b"]
    assert str(tmp_path / "a") not in sys.path


def test_a_module_with_the_name_of_an_installed_one_is_named(tmp_path):
    write(tmp_path, {"mine.py": "import numpy\n", "numpy.py": ""})
    with pytest.raises(ConfigError, match=r"numpy\.py has the name of an installed module"):
        load_user_object("mine.py:x", setting="s", folder=tmp_path)


def test_an_error_in_such_a_module_is_told_with_its_place(tmp_path):
    write(tmp_path, {"mine.py": "import breaks_here\n", "breaks_here.py": "1 / 0\n"})
    with pytest.raises(ConfigError, match=r"ZeroDivisionError: .*breaks_here\.py line 1"):
        load_user_object("mine.py:x", setting="s", folder=tmp_path)
