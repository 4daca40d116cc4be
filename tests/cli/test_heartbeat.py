"""Dots while a command writes nothing."""

import sys
import time

from xtuner.cli._heartbeat import heartbeat


def test_dots_show_that_a_silent_command_is_alive(capsys):
    before = sys.stdout, sys.stderr
    with heartbeat(seconds=0.02):
        print("Loading")
        while "." not in (errors := capsys.readouterr().err):
            time.sleep(0.01)
        print("Done", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    assert set(errors) <= {".", "\n"}
    rest = capsys.readouterr()
    assert rest.err.lstrip(".").removeprefix("\n").startswith("Done\n") and not rest.out


def test_it_can_be_off(capsys):
    before = sys.stdout
    with heartbeat(on=False):
        assert sys.stdout is before


def test_the_first_line_says_that_a_slow_command_loads(capsys):
    with heartbeat(first="Loading..."):
        while "Loading...\n" not in capsys.readouterr().err:
            time.sleep(0.02)
    with heartbeat(first="Loading..."):
        print("at once")
        time.sleep(0.7)
    assert "Loading" not in capsys.readouterr().err
