"""The settings of a run in its work dir: ``WORK_DIR/<name>.py``, which names copies of the user's
Python files in ``WORK_DIR/user_code``, so that it works from any folder. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xtuner import plugins
from xtuner.config.load import LoadedSettings
from xtuner.config.render import render_all
from xtuner.config.schema import Settings
from xtuner.local_imports import local_imports

_USER_CODE = "user_code"


def keep_settings(loaded: LoadedSettings, work_dir: Path) -> None:
    """Write all settings, as resolved, to the work dir. Paths are absolute. The user's own file is
    never overwritten, even if it is in the work dir.
    """
    file = work_dir / f"{loaded.name}.py"
    if loaded.path is not None and file.resolve() == loaded.path.resolve():
        file = _beside(file)
    text, copies = _resolved(loaded, work_dir)
    for copy, content in copies.items():
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
    file.write_text(text, encoding="utf-8")


def are_kept(loaded: LoadedSettings, work_dir: Path) -> bool:
    """Whether a run of exactly these settings has started in `work_dir`. Writes nothing."""
    file = work_dir / f"{loaded.name}.py"
    files = [path for path in (file, _beside(file)) if path.is_file()]
    found = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return bool(found) and _resolved(loaded, work_dir)[0] in found


def _beside(file: Path) -> Path:
    return file.with_stem(f"{file.stem}_resolved")


def _resolved(loaded: LoadedSettings, work_dir: Path) -> tuple[str, dict[Path, bytes]]:
    """The text of the settings file, and the contents of the copies that it names."""
    given = loaded.settings
    paths = {name: getattr(given, name) for name in type(given).paths()}
    changes = {name: _absolute(value, loaded.folder) for name, value in paths.items()}
    named, copies = _with_copies(given, loaded.folder, work_dir)
    settings = given.model_copy(update=changes | named)
    return render_all(settings, title=f"All settings of {loaded.name}, as resolved"), copies


def _with_copies(
    settings: Settings, folder: Path, work_dir: Path
) -> tuple[dict[str, Any], dict[Path, bytes]]:
    """The settings that name Python files as ``"my_file.py:object"``, with the paths of copies; and
    the contents of these copies, with the modules that they import from their own folder."""
    copies: dict[Path, bytes] = {}

    def kept(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(kept(item) for item in value)
        if not isinstance(value, str) or not plugins.is_user_path(value):
            return value
        if (file := plugins.user_file(value, folder)) is None:
            return value
        copy = _add_copy(file, work_dir / _USER_CODE, copies)
        return f"{copy.relative_to(work_dir).as_posix()}:{value.rpartition(':')[2]}"

    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    changed = {name: kept(value) for name, value in values.items()}
    return {name: value for name, value in changed.items() if value != values[name]}, copies


def _add_copy(file: Path, folder: Path, copies: dict[Path, bytes]) -> Path:
    """Add the copy of `file` in `folder` to `copies`, and return its path; with local imports, it
    is in a folder of its own there. An existing file with other content is kept, and the copy gets
    another name."""
    local = local_imports(file)
    root = file.parent.resolve()
    contents = {path.relative_to(root): path.read_bytes() for path in local.values()}
    contents[Path(file.name)] = file.read_bytes()
    for number in range(1, 1000):
        stem = file.stem if number == 1 else f"{file.stem}_{number}"
        target = folder / stem if local else folder
        names = {name: name if local else Path(f"{stem}{file.suffix}") for name in contents}
        if all(_is_free(target / names[n], contents[n], copies) for n in contents):
            break
    copies.update({target / names[name]: content for name, content in contents.items()})
    return target / names[Path(file.name)]


def _is_free(file: Path, content: bytes, copies: dict[Path, bytes]) -> bool:
    """Whether `file` does not exist or has `content`, once `copies` are written."""
    if file in copies:
        return copies[file] == content
    return not file.exists() or file.read_bytes() == content


def _absolute(value: Any, folder: Path) -> Any:
    """The absolute path of each name in `value` that exists in `folder` or in the working
    directory; other names and None are unchanged."""
    if isinstance(value, tuple):
        return tuple(_absolute(name, folder) for name in value)
    if value is None:
        return None
    candidates = (base / Path(value).expanduser() for base in (folder, Path.cwd()))
    return next((str(path.resolve()) for path in candidates if path.exists()), value)
