"""The data commands with images: rows are read as in training."""

import json

import pytest

from xtuner.cli.app import main
from xtuner.testing.vision import tiny_llava_data, tiny_vision_tower_folder


@pytest.fixture
def config(tmp_path, tiny_model_path):
    tiny_vision_tower_folder(tmp_path / "clip")
    tiny_llava_data(tmp_path / "d.json", tmp_path / "images", count=4)
    path = tmp_path / "my_run.py"
    path.write_text(
        f"llm_name_or_path = {str(tiny_model_path)!r}\n"
        f"visual_encoder_name_or_path = {str(tmp_path / 'clip')!r}\n"
        "data_path = 'd.json'\nimage_folder = 'images'\nmax_length = 120\nshuffle = False\n"
    )
    return path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def test_good_rows_with_images_pass_the_check(config, capsys):
    code, out = run(capsys, "check-custom-dataset", config)
    assert code == 0 and "4 rows, format llava (auto)" in out and "No bad rows." in out


def test_check_reports_a_bad_image(config, capsys):
    (config.parent / "images" / "1.png").write_bytes(b"no image")
    code, out = run(capsys, "check-custom-dataset", config)
    assert code == 2 and out.splitlines()[0].startswith(
        "d.json row 2  image '1.png': is not an image"
    )


def test_messages_name_the_max_length_that_was_written(config, capsys):
    code, out = run(capsys, "check-custom-dataset", config, "--set", "max_length=10")
    assert code == 2 and "124" not in out
    assert "within max_length = 10 tokens plus 4 for one image; raise max_length" in out


@pytest.mark.parametrize(
    ("show", "words"),
    [
        ("text", "<|im_start|>user\n[<image> 0.png: 4 tokens]\nWhich"),
        ("masked_text", "tokens …][<image> 0.png: 4 tokens][… "),
        ("input_ids", " [<image> 0.png: 4 tokens] "),
        ("labels", "-100 [<image> 0.png: 4 tokens] -100"),
    ],
)
def test_image_is_shown_once(config, capsys, show, words):
    code, out = run(capsys, "log-dataset", config, "--show", show)
    assert code == 0 and words in out and "<image><image>" not in out and "261 261" not in out


def test_images_that_stand_together_and_one_that_is_cut(config, capsys):
    row = {
        "image": ["0.png", "1.png"],
        "conversations": [
            {"from": "human", "value": "<image><image>Both?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    (config.parent / "d.json").write_text(json.dumps([row]))
    code, out = run(capsys, "log-dataset", config)
    assert code == 0
    assert "user\n[<image> 0.png: 4 tokens][<image> 1.png: 4 tokens]Both?" in out
