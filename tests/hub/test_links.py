"""A link that leads out of a folder is not copied as its content."""

import shutil

import pytest

from xtuner.convert.split import split
from xtuner.errors import ModelError
from xtuner.hub.links import refuse_links_out


@pytest.mark.parametrize("form", ["absolute", "relative", "folder", "chain", "broken"])
def test_a_link_that_leads_out_is_refused(form, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    refuse_links_out(model)
    if form == "chain":
        (model / "a").symlink_to("b")
    target = {"relative": "../private/key", "folder": "../private", "broken": "../nothing"}
    (model / "b").symlink_to(target.get(form, tmp_path / "private" / "key"))
    with pytest.raises(ModelError, match=r"is a link to .*(private|nothing).* not allowed"):
        refuse_links_out(model)


def test_links_within_the_folder_and_the_hubs_cache_are_allowed(tmp_path):
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "f00").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    (snapshot / "same.json").symlink_to("config.json")
    refuse_links_out(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    refuse_links_out(tmp_path / "link")
    (snapshot / "x").symlink_to(tmp_path)
    with pytest.raises(ModelError):
        refuse_links_out(snapshot)


def test_split_copies_no_private_file(tmp_path, tiny_model_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_path, model)
    (tmp_path / "key").write_text("secret")
    (model / "notes.txt").symlink_to(tmp_path / "key")
    with pytest.raises(ModelError, match=r"notes\.txt"):
        split(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (model / "notes.txt").unlink()
    split(model, tmp_path / "out", log=lambda line: None)
