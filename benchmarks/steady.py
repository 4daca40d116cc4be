"""Check that memory does not grow during a run: RSS at steps 10, 50, 100 ... 500.

python benchmarks/steady.py [--data ROWS.json] [--model DIR] [--steps 500] [--max-length 256]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from cpu import HOME, run_xtuner
from rows import rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path, default=HOME / "models/smollm2_135m_instruct")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base_dir = Path(folder)
        if options.data is None:
            options.data = base_dir / "rows.json"
            options.data.write_text(json.dumps(rows(999)))
        options.data, options.model = options.data.resolve(), options.model.resolve()
        settings = {"tuning": "lora", "max_length": options.max_length}
        scalars, peak = run_xtuner(settings, base_dir, options)
    print("| step | MiB |\n|---|---|")
    for step in (10, 50, *range(100, len(scalars) + 1, 100)):
        print(f"| {step} | {scalars[step - 1]['memory_mb']:,.0f} |")
    print(f"| peak, including saving | {peak:,.0f} |")


if __name__ == "__main__":
    main()
