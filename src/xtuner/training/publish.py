"""Uploads the result of a run to the hub (`push_to_hub`)."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from xtuner.engine.checkpoint import UPLOAD
from xtuner.engine.training_state import STATE_FILE
from xtuner.errors import ConfigError, LaunchError, message_of, shell_command
from xtuner.hub import fetch
from xtuner.hub.json_files import write_object
from xtuner.hub.sharing import last_parts, public_name, shareable
from xtuner.models import manifest
from xtuner.models.run_info import FILE_NAME as RUN_FILE
from xtuner.models.run_info import without_folders

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def check_target(repo: str) -> None:
    """Check before a run that its result can be uploaded to `repo`. Without a network only the
    upload fails.

    Raises:
        ConfigError: The name is not 'owner/name', there is no access token, the hub does not accept
            it, or the hub is switched off.
    """
    if not _REPO.fullmatch(repo):
        raise ConfigError(f"push_to_hub = {repo!r}: must be 'owner/name' on the hub")
    from huggingface_hub import constants, get_session, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"push_to_hub = {repo!r}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it"
        )
    token = get_token()
    if not token:
        raise ConfigError(
            f"push_to_hub = {repo!r}: there is no access token for the hub; run `hf auth login` "
            "or set HF_TOKEN"
        )
    try:
        reply = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2",
            headers={"Authorization": f"Bearer {token}"},
            timeout=fetch.HUB_TIMEOUT,
        )
    except Exception:  # no network now; there may be one at the end of the run
        return
    if reply.status_code in (401, 403):
        raise ConfigError(
            f"push_to_hub = {repo!r}: the hub does not accept the access token; run `hf auth "
            "login` or set HF_TOKEN to a valid token with write permission"
        )


def publish(checkpoint: Path, repo: str, *, private: bool) -> str:
    """Upload `checkpoint`, without the files for resuming and without local paths.

    Args:
        checkpoint: A folder ``iter_N``.
        repo: 'owner/name'; created if it does not exist.
        private: Whether a new repository is private.

    Returns:
        The repository's URL.

    Raises:
        LaunchError: The upload fails; the checkpoint is untouched, and the files to upload are left
            in a folder next to it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    staged = checkpoint.parent / f"{UPLOAD}{checkpoint.name}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        stage(checkpoint, staged)
    except Exception as error:
        shutil.rmtree(staged, ignore_errors=True)  # incomplete, perhaps with local paths
        raise LaunchError(
            f"push_to_hub = {repo!r}: the run is done and saved in {checkpoint}, but its files "
            f"cannot be prepared for the upload: {_reason(error)}"
        ) from error
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=str(staged),
            commit_message=f"Upload {checkpoint.name} of xtuner",
        )
    except Exception as error:  # the library raises many types, including network errors
        again = ["hf", "upload", repo, str(staged), *(["--private"] if private else [])]
        raise LaunchError(
            f"push_to_hub = {repo!r}: the run is done and saved in {checkpoint}, but the upload "
            f"failed: {_reason(error)}. Try again: {shell_command(*again)}"
        ) from error
    shutil.rmtree(staged, ignore_errors=True)
    return str(address)


def _reason(error: BaseException) -> str:
    """`error` and what caused it in one line, without the signatures in addresses."""
    line = re.sub(r"(https?://[^\s?]+)\?[^\s'\")]+", r"\1", message_of(error)).rstrip(".")
    return f"{line}: {_reason(error.__cause__)}" if error.__cause__ else line


def stage(checkpoint: Path, target: Path) -> None:
    """Link or copy the public files of `checkpoint` to the new folder `target`."""
    shutil.copytree(
        checkpoint,
        target,
        ignore=shutil.ignore_patterns(STATE_FILE, manifest.FILE_NAME, ".*"),
        copy_function=_link_or_copy,
    )
    base = ""
    if (file := target / "adapter_config.json").is_file():
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"] = public_name(
            str(config.get("base_model_name_or_path") or "")
        )
        write_object(file, config)
    if (file := target / RUN_FILE).is_file():
        info: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        base = info["base_model"] = public_name(str(info.get("base_model") or ""))
        settings = info.get("settings") or {}
        settings["pretrained_model_name_or_path"] = base
        info["settings"] = without_folders(settings)
        info["visual_encoder"] = public_name(str(info.get("visual_encoder") or ""))
        if info.get("template"):
            info["prompt_template"] = last_parts(info.get("prompt_template"))
        text = yaml.safe_dump(shareable(info), allow_unicode=True, sort_keys=False)
        file.write_text(text, encoding="utf-8")
    if not (target / "README.md").exists():
        (target / "README.md").write_text(_card(base), encoding="utf-8")
    manifest.write(target)


def _link_or_copy(source: str, target: str) -> None:
    """Link large files, which are only read; copy the others, which may be changed."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
        except OSError:
            pass
        else:
            return
    shutil.copy2(source, target)


def _card(base: str) -> str:
    head = {"library_name": "peft" if base else "transformers", "tags": ["xtuner"]}
    named = {"base_model": base} if "/" in base else {}
    return f"---\n{yaml.safe_dump({**named, **head})}---\n\nTrained with xtuner.\n"
