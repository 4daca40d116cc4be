"""Find plug-ins by file name.

A plug-in folder is a package such as `xtuner.data.formats`; the name of a plug-in is the name of
its file. A user's own object is named ``"my_file.py:object"``. Listing names imports nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from xtuner.errors import ConfigError, did_you_mean, in_one_line
from xtuner.local_imports import local_imports


def names(package: str) -> list[str]:
    """Names of the plug-ins in `package`, sorted, without importing them.

    ``base.py`` and files that begin with an underscore are not plug-ins.
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not a package"
    files = (p for folder in spec.submodule_search_locations for p in Path(folder).glob("*.py"))
    return sorted(p.stem for p in files if not p.stem.startswith("_") and p.stem != "base")


_OWN = Path(__file__).parent
_STANDARD_LIBRARY = tuple({Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")})
_USER_MODULE = "xtuner_user_"
"""Beginning of the names of modules that are users' files."""


def described(error: BaseException, *, of: Any = None) -> str:
    """An exception of a user's code in one line, with the file and line of that code.

    Args:
        of: The function that was called, to be named if it cannot be called like that.
    """
    text = in_one_line(error)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text}, line {error.lineno}" if "line " not in text else text
    location = user_location(error)
    if not location and (code := getattr(of, "__code__", None)):
        location = f"{code.co_filename} line {code.co_firstlineno}"
    return f"{text} ({location})" if location else text


def user_location(error: BaseException) -> str:
    """File and line of the innermost call in a user's file, or in a file next to it; empty if
    there is none. Installed packages and Python itself are not the user's, even if they are below
    such a folder."""
    files = [m.__file__ for n, m in list(sys.modules.items()) if n.startswith(_USER_MODULE)]
    folders = {Path(file).parent for file in files if file}
    found, step = "", error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if _is_users(Path(code.co_filename), folders):
            found = f"{code.co_filename} line {step.tb_lineno}, in {code.co_name}"
        step = step.tb_next
    return found


def _is_users(file: Path, folders: Iterable[Path]) -> bool:
    installed = {"site-packages", "dist-packages"} & {*file.parts}
    if installed or any(file.is_relative_to(path) for path in (_OWN, *_STANDARD_LIBRARY)):
        return False
    return any(file.is_relative_to(folder) for folder in folders)


def is_user_path(name: str) -> bool:
    """Whether `name` has the form ``"my_file.py:object"``."""
    path, _, attribute = name.rpartition(":")
    return path.endswith(".py") and attribute.isidentifier()


def load(package: str, name: str, *, setting: str) -> ModuleType:
    """Import plug-in `name` of `package`.

    Args:
        package: The plug-in folder as a dotted name.
        name: The file name without ``.py``.
        setting: The setting that has the value `name`, for the message.

    Raises:
        ConfigError: There is no such plug-in.
    """
    allowed = names(package)
    if name not in allowed:
        raise ConfigError(
            f"{setting} = {name!r}: must be one of {', '.join(allowed)}, "
            f"or 'my_file.py:object'{did_you_mean(name, allowed)}"
        )
    return importlib.import_module(f"{package}.{name}")


def user_file(name: str, folder: Path | None) -> Path | None:
    """The file of ``"my_file.py:object"``: relative to `folder`, else to the working directory;
    None if there is none."""
    found = (path for path in _candidates(name, folder) if path.is_file())
    return next(found, None)


def _candidates(name: str, folder: Path | None) -> list[Path]:
    file = Path(name.rpartition(":")[0]).expanduser()
    return [base / file for base in (folder, Path.cwd()) if base]


def load_user_object(name: str, *, setting: str, folder: Path | None = None) -> Any:
    """Load ``"my_file.py:object"``; a relative path is looked up in `folder`, then in the working
    directory. The file may import modules from its own folder (see `local_imports`).

    Raises:
        ConfigError: The file is missing, cannot be imported, or does not define the object.
    """
    file, _, attribute = name.rpartition(":")
    if (path := user_file(name, folder)) is None:
        looked = ", ".join(map(str, dict.fromkeys(_candidates(name, folder))))
        raise ConfigError(f"{setting} = {name!r}: no file {file!r} (looked for {looked})")
    path = path.resolve()
    module_name = f"{_USER_MODULE}{path.stem}_{abs(hash(str(path)))}"
    if module_name in sys.modules:
        module = sys.modules[module_name]
    else:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        _local.offer(path, setting=f"{setting} = {name!r}")
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            words = described(error)
            del sys.modules[module_name]
            raise ConfigError(f"{setting} = {name!r}: importing {path} failed: {words}") from error
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(
            f"{setting} = {name!r}: {path} does not define {attribute!r}; it defines "
            f"{', '.join(public) or 'no public names'}"
            f"{did_you_mean(attribute, public)}"
        )
    return getattr(module, attribute)


def load_user_class(name: str, base: type, *, setting: str, folder: Path) -> Any:
    """As `load_user_object`, for a subclass of `base`."""
    kind = load_user_object(name, setting=setting, folder=folder)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        path = f"{base.__module__}.{base.__qualname__}"
        raise ConfigError(f"{setting} = {name!r}: is not a subclass of {path}")
    if problems := [*_wrong_overrides(kind, base)]:
        raise ConfigError(f"{setting} = {name!r}: {'; '.join(problems)}")
    return kind


def _wrong_overrides(kind: type, base: type) -> Iterator[str]:
    """Yield the problems of the methods of `kind`, a user's subclass of `base`: names that `base`
    does not call, and parameters other than those that it passes."""
    if problem := _misfit(kind, base):
        taken = inspect.signature(base)
        yield f"{kind.__name__} is created like {base.__name__}{taken}, but {problem}"
    methods = [n for n in dir(base) if n[0] != "_" and callable(getattr(base, n))]
    missing = []
    for name in methods:
        own, original = inspect.getattr_static(kind, name), inspect.getattr_static(base, name)
        where = f"{kind.__name__}.{name}"
        if own is original:
            missing.append(name)
        elif not callable(own) and not isinstance(own, classmethod | functools.partialmethod):
            yield f"{where} is {own!r}; it must be a method"
        elif problem := _misfit(_bound(own, original), _bound(original, original)):
            takes = inspect.signature(getattr(base, name))
            yield f"{where}{_plain(takes)} is called, but {problem}"
    yield from _misspelled(kind, base, methods, missing)


def _misspelled(
    kind: type, base: type, methods: Sequence[str], missing: Sequence[str]
) -> Iterator[str]:
    """Yield the functions of `kind` that look like one of `methods`, those of `base`: `kind` does
    not call them itself, and they take the arguments of a method that `kind` lacks."""
    classes = kind.__mro__[: kind.__mro__.index(base)]
    functions = {n: f for c in classes for n, f in vars(c).items() if inspect.isfunction(f)}
    for name, own in functions.items():
        others = [f.__code__.co_names for f in functions.values() if f is not own]
        if name[0] == "_" or hasattr(base, name) or any(name in names for names in others):
            continue
        originals = {n: inspect.getattr_static(base, n) for n in missing}
        fitting = [n for n, f in originals.items() if not _misfit(_bound(own, f), _bound(f, f))]
        events = [n for n in fitting if n.startswith("on_")]
        guess = did_you_mean(name, fitting, cutoff=0.85)
        if guess or (events and name.startswith("on_")):
            rest = guess or f"; it has {', '.join(methods)}"
            yield f"{kind.__name__}.{name}: {base.__name__} has no such method{rest}"


def _bound(own: Any, original: Any) -> Any:
    """`own`, an attribute of a class, as it is called where `original` is called: on an object, or
    on the class if that is a class method."""
    on_class = isinstance(original, classmethod | staticmethod)
    bind = getattr(type(own), "__get__", None)
    return bind(own, None if on_class else object(), object) if bind else own


def _misfit(own: Any, original: Any) -> str:
    """Why `own` does not take the arguments of `original`, neither all nor the required ones, and
    where it is defined; empty if it does, or if its parameters are unknown."""
    given = inspect.signature(original).parameters.values()
    try:
        taken = inspect.signature(own)
    except ValueError:
        return ""
    problem = ""
    for parameters in (given, [p for p in given if p.default is p.empty]):
        keywords = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
        positional = [
            p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        try:
            taken.bind(*positional, **keywords)
        except TypeError as error:
            problem = f"{error}{_defined(own)}"
        else:
            return ""
    return problem


def _plain(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"


def _defined(own: Any) -> str:
    """Where `own`, a function or class of a user, is defined."""
    function = getattr(own, "__init__", None) if isinstance(own, type) else own
    code = getattr(function, "__code__", None)
    return f" ({code.co_filename} line {code.co_firstlineno})" if code else ""


class _LocalModules:
    """Finds the modules that a user's file imports from its own folder, and no others there.

    If two users' files import different modules by one name, each gets its own: the module of the
    file that was loaded before is unloaded.
    """

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}

    def offer(self, file: Path, *, setting: str) -> None:
        """Let `file` import its `local_imports`.

        Raises:
            ConfigError: An installed module has the name of one of them.
        """
        files = {
            name: path
            for name, path in local_imports(file).items()
            if name.partition(".")[0] not in sys.stdlib_module_names
        }
        files = _namespaces(file.parent.resolve(), files) | files
        for name, path in files.items():
            if self._files.get(name) not in (None, path):
                sys.modules.pop(name, None)
                del self._files[name]
        for name, path in files.items():
            origin = None if "." in name or name in self._files else _origin(name)
            if origin is not None and origin != path:
                raise ConfigError(
                    f"{setting}: {path} has the name of an installed module ({origin}); rename it"
                )
        self._files |= files
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        file = self._files.get(name)
        if file is None:
            return None
        if file.is_dir():
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(file)]
            return spec
        inside = [str(file.parent)] if file.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)


def _namespaces(folder: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """The packages of `files` that have no ``__init__.py``, and where they are."""
    parts = [name.split(".")[:-1] for name in files]
    return {
        ".".join(each[:count]): folder.joinpath(*each[:count])
        for each in parts
        for count in range(1, len(each) + 1)
    }


_local = _LocalModules()


def _origin(name: str) -> Path | None:
    """The file of the module that ``import name`` loads; None if there is none."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(found.origin).resolve() if found and found.origin else None


def same_type(value: Any, default: Any) -> bool:
    """Whether `value` may take the place of `default`, an option of a plug-in."""
    if default is None or isinstance(default, bool) or isinstance(value, bool):
        return default is None or isinstance(value, bool) == isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))
