"""Commands of xtuner, one after the other, on a GPU on paper: a list of {"arguments", "mib"} as
JSON on stdin; on stdout, for each, a line of JSON that says what came of it. With an argument
"liger" there is a stand-in for liger's kernels; with "turing" the card has no bfloat16, as a T4."""

import contextlib
import io
import json
import sys

from xtuner.testing.fake_cuda import device


def main() -> None:
    """Run them."""
    card = device.install(2**40, (7, 5) if "turing" in sys.argv else (9, 0))
    from liger_stub import Stand

    from xtuner.cli.app import main as xtuner

    stand = Stand()
    sys.modules.update(stand.modules if "liger" in sys.argv else {})
    for command in json.load(sys.stdin):
        card.limit(card.held + int(command.get("mib", 2**20) * device.MB))
        card.forget_most()
        stand.calls.clear()
        held, waits, plans, text = card.held, card.waits, card.plans, io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                code = xtuner(command["arguments"])
            except RuntimeError as error:  # what the card refuses
                code = str(error)
        report = {"code": code, "text": text.getvalue(), "most": card.most - held}
        report["calls"] = sorted(set(stand.calls))
        report |= {"waits": card.waits - waits, "plans": card.plans - plans}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
