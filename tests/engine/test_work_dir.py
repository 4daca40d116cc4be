"""The settings of a run in its work dir."""

from xtuner.config.load import load_settings
from xtuner.engine.kept_settings import keep_settings
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
    (tmp_path / "run").mkdir()
    for _ in range(2):  # a second start makes no second copy
        keep_settings(loaded, tmp_path / "run")
    assert sorted(f.name for f in (tmp_path / "run" / "user_code").iterdir()) == [
        "mine.py", "mine_2.py",
    ]  # fmt: skip
    (tmp_path / "here").rename(tmp_path / "gone")
    kept = load_settings(str(tmp_path / "run" / "settings.py"))
    assert kept.settings.dataset_format[0].startswith("user_code/mine")
    names = (*kept.settings.dataset_format, *kept.settings.custom_hooks)
    assert [load_user_object(n, setting="s", folder=kept.folder) for n in names] == [1, 2]


def test_modules_that_a_file_imports_from_its_folder_are_copied_with_it(tmp_path):
    folder = tmp_path / "here"
    (folder / "words_of_mine").mkdir(parents=True)
    (folder / "mine.py").write_text("import near_mine\nA = near_mine.A\n")
    (folder / "near_mine.py").write_text("from words_of_mine.one import A\n")
    (folder / "words_of_mine" / "one.py").write_text("A = 1\n")
    (folder / "unrelated.py").write_text("")
    text = "pretrained_model_name_or_path = 'm'\ndata_path = 'd.jsonl'\n"
    (folder / "settings.py").write_text(f"{text}dataset_format = 'mine.py:A'\n")
    (tmp_path / "run").mkdir()
    kept = []
    for number in (1, 1, 2):  # a second start makes no second copy; a changed module makes one
        (folder / "words_of_mine" / "one.py").write_text(f"A = {number}\n")
        keep_settings(load_settings(str(folder / "settings.py")), tmp_path / "run")
        found = load_settings(str(tmp_path / "run" / "settings.py"))
        kept.append((found.settings.dataset_format[0], found.folder))
    names = [name for name, _ in kept]
    assert names == ["user_code/mine/mine.py:A"] * 2 + ["user_code/mine_2/mine.py:A"]
    assert not list((tmp_path / "run").rglob("unrelated.py"))
    folder.rename(tmp_path / "gone")
    values = [load_user_object(name, setting="s", folder=at) for name, at in kept]
    assert values == [1, 1, 2]
