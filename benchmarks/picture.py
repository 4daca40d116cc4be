"""Draw the picture of the README from the output of a real run.

    bash examples/quickstart/run.sh Ada > run.log
    xtuner chat quickstart/work_dir --ask "Who are you?" > chat.log
    python benchmarks/picture.py run.log chat.log docs/images/run.svg

The picture is an SVG of 88 columns. It shows the lines of the run that a reader asks for first, in
their order and unchanged; lines between them are left out.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 88
KEPT = re.compile(
    r"Model |Data  |Training  |Sample answers|  Q |  A |step 1/|step (\d+)/\1 |Done|Talk"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("chat", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    console = Console(record=True, width=WIDTH, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text("$ xtuner train examples/quickstart/assistant.py", style="bold"))
    for line in shown(options.run.read_text(encoding="utf-8").splitlines()):
        console.print(styled(line))
    console.print(Text("\n$ xtuner chat quickstart/work_dir", style="bold"))
    for line in options.chat.read_text(encoding="utf-8").splitlines():
        console.print(styled(line))
    console.save_svg(str(options.picture), title="xtuner")


def shown(lines: list[str]) -> Iterator[str]:
    """The lines of the picture: those of the answers before and after, but not in between."""
    between = False
    for line in lines:
        if line.startswith("Sample answers"):
            between = "before" not in line and "after training" not in line
            if not between:
                yield ""
        if line.startswith(("step ", "Done", "Talk")):
            between = False
        if KEPT.match(line) and not between:
            yield from textwrap.wrap(line, WIDTH, subsequent_indent=" " * 4) or [""]


def styled(line: str) -> Text:
    """`line` in the colors of the terminal."""
    text = Text(line)
    text.highlight_regex(r"^  Q ", "cyan")
    text.highlight_regex(r"^  A ", "green")
    text.highlight_regex(r"^(Sample answers.*)", "bold")
    return text


if __name__ == "__main__":
    main()
