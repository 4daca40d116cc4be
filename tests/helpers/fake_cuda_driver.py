"""Run xtuner commands on the fake CUDA device: each line on stdin is a command {"arguments", "mib"}
as JSON, and each line on stdout its result. The argument "liger" installs a stub of the Liger
kernels; "turing" imitates a T4 without bfloat16."""

import contextlib
import io
import json
import sys

from xtuner.testing.fake_cuda import device


def main() -> None:
    """Run the commands on stdin."""
    card = device.install(2**40, (7, 5) if "turing" in sys.argv else (9, 0))
    from liger_stub import LigerStub

    from xtuner.cli.app import main as xtuner

    stub = LigerStub()
    sys.modules.update(stub.modules if "liger" in sys.argv else {})
    for line in sys.stdin:
        command = json.loads(line)
        card.limit(card.allocated + int(command.get("mib", 2**20) * device.MB))
        card.reset_peak()
        stub.calls.clear()
        held, waits, plans, text = card.allocated, card.syncs, card.cudnn_plans, io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                code = xtuner(command["arguments"])
            except RuntimeError as error:  # what the device rejects
                code = str(error)
        report = {"code": code, "text": text.getvalue(), "most": card.peak - held}
        report["calls"] = sorted(set(stub.calls))
        report |= {"waits": card.syncs - waits, "plans": card.cudnn_plans - plans}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
