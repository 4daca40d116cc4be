"""The time and memory of chat templates are limited, without effect on ordinary ones."""

import resource
import signal
import subprocess
import sys
import threading

import pytest

from xtuner.errors import DataError, ModelError
from xtuner.templates.auto import ChatTemplate
from xtuner.templates.bounds import OutOfBoundsError, bounded, check_output
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.types import Message

HONEST = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
BOMBS = {
    "product": "{{ 'a' * 9999999999 }}",
    "power": "{{ 'a' * (10 ** 10) }}",
    "width": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '{:9999999999}'.format('a') }}",
    "filter": "{{ 'a' | center(9999999999) }}",
    "doubling": "{% set n = namespace(x='ab' * 1000) %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% set k = j %}{% endfor %}"
    "{% endfor %}",
    "range": "{{ range(10 ** 9) | list | length }}",
    "long range": "{% for i in range(999999) %}{% endfor %}",
    "huge number": "{{ 10 ** (10 ** 8) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "output": "{% for i in range(50000) %}{{ 'ab' * 500 }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """A time limit that a test can wait for."""
    monkeypatch.setitem(bounded.__wrapped__.__kwdefaults__, "cpu_seconds", 0.5)


def template_of(text):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize("bomb", list(BOMBS))
def test_template_bomb_is_reported_on_load(bomb):
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(
        ModelError, match=r"exceeds its bounds: it (takes|calls|writes|computes|fails).*chatml"
    ):
        template_of(BOMBS[bomb])
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before


def test_template_bomb_with_a_trigger_fails_only_its_conversation():
    text = "{% if messages[0]['content'] == 'now' %}{{ 'a' * 9999999999 }}{% endif %}" + HONEST
    template = template_of(text)
    with pytest.raises(ModelError, match="memory"):
        template.prompt_ids([Message("user", "now")])
    assert template.prompt_ids([Message("user", "later")])
    for _ in range(4):
        with pytest.raises(ModelError):
            template.prompt_ids([Message("user", "now")])
    with pytest.raises(ModelError, match="again and again"):
        template.prompt_ids([Message("user", "later")])


def test_valid_template_with_a_long_conversation_passes():
    template = template_of(HONEST)
    long = [Message("user", "word " * 200_000), Message("assistant", "x" * 1000)] * 3
    assert template.render(long).text.count("word") == 600_000


def test_threads_share_the_limit_and_leave_none():
    before = resource.getrlimit(resource.RLIMIT_AS)
    inside, leave = threading.Barrier(2), threading.Barrier(2)

    def other():
        with bounded():
            inside.wait()
        leave.wait()

    thread = threading.Thread(target=other)
    with bounded():
        thread.start()
        inside.wait()
        leave.wait()
        assert resource.getrlimit(resource.RLIMIT_AS) != before
    thread.join()
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_the_output_may_grow_with_what_is_given():
    check_output(10_000_000, given=0)
    check_output(60_000_000, given=1_000_000)
    with pytest.raises(OutOfBoundsError, match="writes 60,000,001"):
        check_output(60_000_001, given=1_000_000)


def test_time_is_bounded_in_other_threads_too():
    template = template_of("{% if messages[0]['content'] == 'now' %}" + BOMBS["loops"]
                           + "{% endif %}" + HONEST)  # fmt: skip
    found = []

    def ask(text):
        try:
            found.append(template.prompt_ids([Message("user", text)]))
        except ModelError as error:
            found.append(str(error))

    for text in ("now", "later"):
        thread = threading.Thread(target=ask, args=(text,))
        thread.start()
        thread.join(60)
    assert "takes more than 0.5 s" in found[0] and found[1] == template.prompt_ids(
        [Message("user", "later")]
    )


def test_keyword_arguments_are_no_powers():
    text = "{% set v = namespace(**{'a': 1}) %}{{ dict({}, **{'b': 2}) | length }}" + HONEST
    assert template_of(text).prompt_ids([Message("user", "a")])


@pytest.mark.parametrize("fault", ["1 // 0", "messages[0] < 3"], ids=["division", "comparison"])
def test_whatever_a_template_raises_is_a_user_error(fault):
    text = "{% if messages[0]['content'] == 'now' %}{{ " + fault + " }}{% endif %}" + HONEST
    with pytest.raises(DataError, match="rejects these messages"):
        template_of(text).prompt_ids([Message("user", "now")])


def test_a_debugger_can_trace_after_a_block_in_a_thread():
    """A withdrawn error made CPython hang in the first traced call."""
    code = """
import sys, threading
from xtuner.templates.bounds import bounded

def ask():
    with bounded():
        pass

thread = threading.Thread(target=ask)
thread.start()
thread.join()
sys.settrace(lambda *_: None)
(lambda: print("traced"))()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "traced\n", done.stderr
