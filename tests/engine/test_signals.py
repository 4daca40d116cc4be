"""The signals of schedulers and closed terminals ask a run to stop."""

import os
import signal
import subprocess
import sys

import pytest

from xtuner.engine.signals import StopRequest

ASKED = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


@pytest.mark.parametrize("number", [s for s in ASKED if s is not signal.SIGHUP])
def test_a_signal_is_a_request(number, capfd):
    before, request = signal.getsignal(number), StopRequest()
    with request.on_signals():
        assert not request.made
        os.kill(os.getpid(), number)
        assert request.made
    told = capfd.readouterr().err
    assert "Stopping after this step" in told
    assert ("Ctrl-C again stops now" in told) is (number is signal.SIGINT)
    assert signal.getsignal(number) is before


SCRIPT = """
import os, signal, sys
from xtuner.engine.signals import StopRequest
request = StopRequest()
with request.on_signals():
    os.kill(os.getpid(), signal.SIGHUP)
    for _ in range(1000):
        print("a line for the terminal")
    sys.exit(3 if request.made else 4)
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_a_request_unless_nohup_ignores_it(ignored):
    action = signal.SIG_IGN if ignored else signal.SIG_DFL
    near, far = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=far, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, action),
    )  # fmt: skip
    os.close(far)
    if not ignored:
        os.close(near)  # writing to the terminal now fails
    else:
        while True:
            try:
                if not os.read(near, 65536):
                    break
            except OSError:
                break
        os.close(near)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (4 if ignored else 3), error.decode()
