"""Fine-tune language models from one settings file.

    import xtuner

    result = xtuner.train("my_run.py", lr=1e-4)
    chat = xtuner.load_chat(result.work_dir)
    print(chat.ask("Who are you?"))

These names are the public API (see docs/api.md); `import xtuner` loads neither torch nor
transformers. Code inside the package imports from the modules, never from here.
"""

from typing import TYPE_CHECKING, Any

from xtuner.errors import XTunerError
from xtuner.version import __version__

if TYPE_CHECKING:
    from xtuner.api import (
        Chat,
        TrainInterrupted,
        TrainResult,
        load_chat,
        load_settings,
        train,
    )

__all__ = [
    "Chat",
    "TrainInterrupted",
    "TrainResult",
    "XTunerError",
    "__version__",
    "load_chat",
    "load_settings",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load the rest of the public API on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from xtuner import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """The public names, before they are loaded."""
    return sorted({*globals(), *__all__})
