"""`xtuner copy-cfg`."""

import pytest

from xtuner.cli.app import main
from xtuner.config.load import load_settings

NAME = "internlm2_chat_1_8b_qlora_alpaca_e3"


def test_writes_a_file_that_trains_like_the_built_in(tmp_path, capsys):
    folder = tmp_path / "new folder" / "inner"
    assert main(["copy-cfg", NAME, str(folder)]) == 0
    path = folder / f"{NAME}_copy.py"
    assert load_settings(path).settings == load_settings(NAME).settings
    shown = capsys.readouterr().out
    assert str(path) in shown
    assert f"xtuner train '{path}'" in shown


def test_does_not_overwrite(tmp_path, capsys):
    path = tmp_path / f"{NAME}_copy.py"
    path.write_text("lr = 1e-4  # mine\n")
    assert main(["copy-cfg", NAME, str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert path.read_text() == "lr = 1e-4  # mine\n"


def test_the_note_of_a_data_set_is_in_the_file(tmp_path):
    name = "llama2_7b_qlora_msagent_e3"
    assert main(["copy-cfg", name, str(tmp_path)]) == 0
    assert "modelscope" in (tmp_path / f"{name}_copy.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["nonsense", "../evil_lora_sql_e3"])
def test_an_unknown_name_writes_nothing(name, tmp_path, capsys):
    folder = tmp_path / "made"
    assert main(["copy-cfg", name, str(folder)]) == 2
    assert name in capsys.readouterr().err
    assert not folder.exists()


def test_file_instead_of_a_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["copy-cfg", NAME, str(tmp_path / "file")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
