"""The page stays in its folders: absolute paths, '..' and links cannot leave them."""

import pytest

from xtuner.errors import ConfigError
from xtuner.web.folders import Folders


@pytest.fixture
def folders(tmp_path):
    for name in ("runs/ada", "data", "secret"):
        (tmp_path / "root" / name).mkdir(parents=True) if name != "secret" else (
            tmp_path / name
        ).mkdir()
    (tmp_path / "root" / "data" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "root" / "runs" / "away").symlink_to(tmp_path / "secret")
    return Folders.of(tmp_path / "root" / "runs", [tmp_path / "root"])


def test_paths_inside_and_names_on_the_hub_pass(folders, tmp_path):
    inside = str(tmp_path / "root" / "data")
    assert folders.check(inside) == inside
    assert folders.check(f"{inside}/../data/rows.jsonl")
    assert folders.check("org/model") == "org/model"


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "{root}/../secret/x", "{root}/data/link/x", "../x", "~/x", "a/../../x", "a\0b"],
    ids=["absolute", "up", "link", "relative", "home", "inner", "nul"],
)
def test_paths_that_lead_out_are_refused(folders, tmp_path, name):
    with pytest.raises(ConfigError):
        folders.check(name.format(root=tmp_path / "root"))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../secret", "a/b", "/etc", ".hidden", "away", "a\0", "ä", "x" * 200],
    ids=["empty", "dot", "up", "out", "inner", "absolute", "hidden", "link", "nul", "letter",
         "long"],
)  # fmt: skip
def test_names_of_runs(folders, name):
    assert folders.work_dir("ada").name == "ada"
    with pytest.raises(ConfigError, match="the name of a run"):
        folders.work_dir(name)
