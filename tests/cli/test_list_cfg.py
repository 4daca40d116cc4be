"""`xtuner list-cfg`."""

from xtuner.cli.app import main


def test_lists_names_on_stdout_and_their_number_beside(capsys):
    assert main(["list-cfg", "-p", "smollm2_135m_instruct_lora"]) == 0
    shown = capsys.readouterr()
    names = shown.out.splitlines()
    assert "smollm2_135m_instruct_lora_alpaca_e3" in names
    assert all(name.startswith("smollm2_135m_instruct_lora_") for name in names)
    assert shown.err.startswith(f"{len(names)} names")


def test_a_pattern_without_a_name_is_an_error(capsys):
    assert main(["list-cfg", "-p", "gpt5"]) == 2
    assert "'gpt5'" in capsys.readouterr().err
