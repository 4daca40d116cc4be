"""Generate instruction rows from common words with the length distribution of Alpaca.

    python benchmarks/rows.py FILE [--rows 999] [--seed 0]

The quantiles below are those of prompts and answers of 999 rows of English Alpaca, in words;
lengths are uniform between quantiles. The benchmarks then need no download.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

WORDS = (
    "the of and to in is it you that he was for on are with as his they be at one have this "
    "from or had by hot but some what there we can out other were all your when up use word "
    "how said an each she which do their time if will way about many then them would write "
    "like so these her long make thing see him two has look more day could go come did my "
    "sound no most number who over know water than call first people may down side been now "
    "find any new work part take get position made live where after back little only round man "
    "year came show every good me give our under name very through just form much great think "
    "say help low line before turn cause same mean differ move right boy old too does tell "
    "sentence set three want air well also play small end put home read hand port large spell "
    "add even land here must big high such follow act why ask men change went light kind off "
    "need house image try us again animal point mother world near build self earth"
).split()
PROMPT_WORDS = (4, 7, 8, 9, 10, 12, 13, 15, 18, 24, 130)
ANSWER_WORDS = (1, 8, 13, 24, 46, 81, 118, 170, 224, 279, 429)


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Make `count` rows ``instruction, input, output``."""
    draw = random.Random(seed)

    def text(quantiles: tuple[int, ...]) -> str:
        position = draw.random() * (len(quantiles) - 1)
        low, high = quantiles[int(position)], quantiles[int(position) + 1]
        length = max(1, round(low + (high - low) * (position % 1)))
        return " ".join(draw.choices(WORDS, k=length))

    return [
        {"instruction": text(PROMPT_WORDS), "input": "", "output": text(ANSWER_WORDS)}
        for _ in range(count)
    ]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=999)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(json.dumps(rows(options.rows, options.seed), indent=0))


if __name__ == "__main__":
    main()
