"""Options of the commands that load a model for questions."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer


class Device(StrEnum):
    """Devices."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    """Number types."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Adapter: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Adapter to load on MODEL.")
]
PromptTemplate: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="T",
        help="Prompt template, as in a settings file. Default: that of the training run, "
        "otherwise the tokenizer's.",
    ),
]
System: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="S", help="System message. Default: that of the training run."),
]
VisualEncoder: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="CLIP", help="Vision tower of the LLaVA model; requires --llava."),
]
Llava: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder with the LLaVA parts that were trained with MODEL."),
]
Bits: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="4|8|16",
        help="Bits per weight. Default: as in the training of the adapter, otherwise 16.",
    ),
]
MaxNewTokens: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Maximum length of an answer in tokens.")
]
DeviceOption: TypeAlias = Annotated[
    Device, typer.Option("--device", help="'auto' uses a GPU if there is one.")
]
DtypeOption: TypeAlias = Annotated[
    Dtype, typer.Option("--dtype", help="Number type of weights and computation.")
]
TrustRemoteCode: TypeAlias = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that ships with the model.")
]
TrustCode: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Run the Python file that the checkpoint names as its template."
    ),
]
