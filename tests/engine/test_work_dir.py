"""The settings of a run in its work dir."""

from xtuner.config.load import load_settings
from xtuner.engine.work_dir import WorkPlace
from xtuner.plugins import load_user_object


def test_python_files_of_the_user_are_copied_and_found_from_the_work_dir(tmp_path):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "here" / "mine.py").write_text("A = 1\n")
    (tmp_path / "here" / "sub" / "mine.py").write_text("B = 2\n")
    settings = tmp_path / "here" / "settings.py"
    settings.write_text(
        "pretrained_model_name_or_path = 'm'\ndata_path = 'd.jsonl'\n"
        "dataset_format = 'mine.py:A'\ncustom_hooks = ['sub/mine.py:B']\n"
    )
    loaded = load_settings(str(settings))
    place = WorkPlace.prepare(tmp_path / "run", resuming=False, overwrite=False)
    for _ in range(2):  # a second start makes no second copy
        place.keep_settings(loaded)
    assert sorted(f.name for f in (tmp_path / "run" / "user_code").iterdir()) == [
        "mine.py", "mine_2.py",
    ]  # fmt: skip
    (tmp_path / "here").rename(tmp_path / "gone")
    kept = load_settings(str(tmp_path / "run" / "settings.py"))
    assert kept.settings.dataset_format[0].startswith("user_code/mine")
    names = (*kept.settings.dataset_format, *kept.settings.custom_hooks)
    assert [load_user_object(n, setting="s", folder=kept.folder) for n in names] == [1, 2]
