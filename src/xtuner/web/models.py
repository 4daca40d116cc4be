"""The models of the page: loaded when chosen, shared by all visitors, the oldest unloaded.

choice ──open──► Opening (its thread loads) ──► ServedModel on the engine
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from xtuner.chat.lookup import find
from xtuner.errors import ModelError, XTunerError
from xtuner.hub.fetch import models_root
from xtuner.runs.listing import work_dirs
from xtuner.serve.engine import Engine
from xtuner.serve.models import ServedModel, Weights, add_model, open_models, short_name
from xtuner.web.folders import Folders

logger = logging.getLogger("xtuner.web")

_KEPT_WEIGHTS = 2
"""Base models in memory: two, for side by side."""


class Choice(NamedTuple):
    """A model to choose: its label, and the path or name that is opened."""

    label: str
    value: str


@dataclass
class Opening:
    """A model that is loading or loaded.

    Attributes:
        value: Path or name.
        served: The model, once it is loaded.
        error: Why it could not be loaded.
        finished: Set at the end.
    """

    value: str
    served: ServedModel | None = None
    error: XTunerError | None = None
    finished: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """What the page calls the model."""
        return short_name(self.value)

    @property
    def seconds(self) -> int:
        """How long it has been loading."""
        return int(time.monotonic() - self.started)

    def result(self) -> ServedModel:
        """The model; waits for it.

        Raises:
            XTunerError: It cannot be loaded.
        """
        self.finished.wait()
        if self.served is None:
            raise self.error or ModelError(f"{self.value}: cannot be loaded")
        return self.served


class ModelPool:
    """Loads models for the page.

    Args:
        engine: The engine that generates the answers.
        folders: The folders of the models.
        given: Models named on the command line, offered first.
        options: Further arguments of `open_chat`.
    """

    def __init__(
        self, engine: Engine, folders: Folders, *, given: tuple[str, ...] = (), **options: Any
    ) -> None:
        self.engine, self._folders = engine, folders
        self._given, self._options = given, options
        self._openings: dict[str, Opening] = {}
        self._bases: dict[tuple[str, str], Weights] = {}  # least recently used first
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def choices(self) -> list[Choice]:
        """The models to choose from: given ones, checkpoints of runs, fetched models."""
        found = [Choice(short_name(value), value) for value in self._given]
        found += self._checkpoints()
        found += [Choice(path.name, str(path)) for path in sorted(models_root().glob("*"))
                  if (path / "config.json").is_file()]  # fmt: skip
        return list({choice.value: choice for choice in found}.values())

    def _checkpoints(self) -> Iterator[Choice]:
        for run in work_dirs(self._folders.runs):
            for path in (*reversed(run.checkpoints()), *run.merged()):
                yield Choice(f"{run.name} · {path.name}", str(path))

    def open(self, value: str) -> Opening:
        """Start to load the model `value`, unless it is loaded or loading.

        Raises:
            ConfigError: The path is outside the folders.
        """
        if value not in self._given:
            self._folders.check(value)
        with self._lock:
            found = self._openings.get(value)
            if found is None or found.error is not None:
                found = self._openings[value] = Opening(value)
                thread = threading.Thread(target=self._load, args=(found,), daemon=True)
                thread.start()
        return found

    def _load(self, opening: Opening) -> None:
        try:
            with self._loading:  # one at a time: the second may share the weights of the first
                opening.served = self._loaded(opening.value)
        except XTunerError as error:
            opening.error = error
        except Exception as error:
            logger.exception("%s could not be loaded", opening.value)
            opening.error = ModelError(f"{opening.value}: {type(error).__name__}: {error}")
        finally:
            opening.finished.set()

    def _loaded(self, value: str) -> ServedModel:
        found = find(value)
        key = (str(Path(found.model).resolve()), found.quantization)
        if found.llava is not None or found.adapter is None:
            if found.llava is None and key in self._bases:
                weights = self._use(key)
                return ServedModel(short_name(value), weights, *self._text(value))
            self._make_room()
            (served,) = open_models(value, **self._options)
            self._bases[(value if found.llava else key[0], key[1])] = served.weights
            return served
        if key in self._bases:
            weights = self._use(key)
            adapter, name = str(found.adapter), short_name(value)
            return self._on_engine(
                lambda: add_model(weights, name, adapter=adapter, base=found.model, **self._options)
            )
        self._make_room()
        (served,) = open_models(value, base_too=False, **self._options)
        self._bases[key] = served.weights
        return served

    def _text(self, value: str) -> tuple[Any, Any]:
        from xtuner.chat.opening import text_parts

        names = ("trust_remote_code", "trust_code")
        options = {name: self._options[name] for name in names if name in self._options}
        return text_parts(find(value), where=value, **options)

    def _use(self, key: tuple[str, str]) -> Weights:
        weights = self._bases.pop(key)
        self._bases[key] = weights
        return weights

    def _make_room(self) -> None:
        """Unload the least recently used weights if there are enough."""
        while len(self._bases) >= _KEPT_WEIGHTS:
            key = next(iter(self._bases))
            weights = self._bases.pop(key)
            with self._lock:
                self._openings = {
                    value: opening
                    for value, opening in self._openings.items()
                    if opening.served is None or opening.served.weights is not weights
                }
            self.engine.call(functools.partial(self.engine.forget, weights))

    def _on_engine(self, make: Callable[[], ServedModel]) -> ServedModel:
        made: list[ServedModel] = []
        self.engine.call(lambda: made.append(make()))
        return made[0]
