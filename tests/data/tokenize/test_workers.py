import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from data_makers import chat, chats, settings, template, text_of, tokenizer, write_jsonl

from xtuner.algorithms import pretrain, sft
from xtuner.data.formats import load
from xtuner.data.sources.resolve import prepare
from xtuner.data.sources.rows import Fault, RawRow, Task
from xtuner.data.tokenize import row_encoder, workers
from xtuner.data.tokenize.row_encoder import Encoder
from xtuner.data.tokenize.workers import chunked, encode_all
from xtuner.errors import DataError, ModelError
from xtuner.types import Encoded, RowRef, Sample


def encoder(format="openai", **changes):
    options = {"template": template(), "tokenizer": tokenizer(), "algorithm": sft.Algorithm()}
    return Encoder(formats=[load(format)], **options | changes)


def encoded_row(row, **changes):
    """The one sequence of a row, or its fault."""
    found = encoder(**changes).encode(task(row))
    return found if isinstance(found, Fault) else found.parts[0]


def task(value, line=1):
    return Task(0, RawRow(line, value, 0))


def encoded_text(text, **changes):
    return encoded_row({"text": text}, format="pretrain", **changes)


class Broken:
    def __init__(self, error):
        self.error = error

    def sequences(self, conversation):
        raise self.error


class Silent:
    def sequences(self, conversation):
        return [Encoded([1, 2, 3], [True, False, False])]


def test_all_tokens_of_a_text_except_the_first_are_supervised():
    encoded = encoded_text("Hi there")
    assert tokenizer().decode(encoded.input_ids) == "Hi there<|im_end|>"
    assert encoded.loss_mask == [False] + [True] * 8
    assert encoded_text("Hi there<|im_end|>") == encoded


def test_a_text_begins_as_the_tokenizer_begins_texts():
    from tokenizers.processors import TemplateProcessing

    from xtuner.testing.tiny import tiny_tokenizer

    own = tiny_tokenizer()
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    for text in ("Hi", "<s>Hi"):
        encoded = encoded_text(text, tokenizer=own)
        assert own.decode(encoded.input_ids) == "<s>Hi<|im_end|>"


def test_a_long_text_is_encoded_in_pieces_and_whole(monkeypatch):
    text = "Zeile eins, ü\n" * 40 + "wort " * 100 + "x" * 300
    whole = encoded_text(text)
    monkeypatch.setattr(row_encoder, "PIECE", 64)
    assert max(map(len, row_encoder._pieces(text))) <= 64
    assert encoded_text(text) == whole


def test_pretraining_learns_every_token_of_a_conversation():
    plain = encoded_row(chat("Hi", "Hello"))
    every = encoded_row(chat("Hi", "Hello"), algorithm=pretrain.Algorithm())
    assert every.input_ids == plain.input_ids
    assert every.loss_mask == [False] + [True] * (len(plain.input_ids) - 1)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role: is 'bot'; it must"),
        ({"messages": []}, "messages: is an empty list; fill it in or remove the row"),
        (b'{"messages": ', "is not valid JSON (column 13: Expecting value)"),
        (Fault("is odd"), "is odd"),
    ],
)
def test_row_errors_have_hints(row, words):
    assert str(encoded_row(row)).startswith(words)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModelError("no place\nfor tools"), "no place for tools"),
        (ValueError("odd roles"), "odd roles"),
        (KeyError("name"), "KeyError: 'name'"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_template_that_fails_costs_the_row_only(error, words):
    assert encoder(template=Broken(error)).encode(task(chat("a", "b"))) == Fault(words)


def test_a_row_without_a_supervised_token_is_a_fault():
    # the first token is never predicted, so its entry in the mask does not count
    fault = encoder(template=Silent()).encode(task(chat("a", "b")))
    assert "no supervised token" in str(fault)


def rows_of(chunks):
    """Each row as (line, ids, mask), each failed one as (line, reason)."""
    good, bad = [], []
    for chunk in chunks:
        ends = np.cumsum(chunk.lengths)
        for line, start, end in zip(chunk.lines, ends - chunk.lengths, ends, strict=True):
            ids, mask = chunk.token_ids[start:end], chunk.mask[start:end]
            good.append((int(line), ids.tolist(), mask.tolist()))
        bad += [(row.line, row.fault) for row in chunk.faults]
    return good, bad


def tasks_for(path):
    (source,) = prepare(settings(path), folder=path.parent)
    return source.tasks()


def test_the_number_of_processes_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "CHUNK_ROWS", 7)
    rows = chats(200)
    rows[5] = {"messages": "no"}
    rows[150]["messages"][1]["role"] = "bot"
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    one, two, three = (
        rows_of(encode_all(encoder(), chunked(tasks_for(path)), processes=n)) for n in (1, 2, 3)
    )
    assert one == two == three
    assert [line for line, *_ in one[0]] == [n for n in range(1, 201) if n not in (6, 151)]
    assert [line for line, _ in one[1]] == [6, 151]
    sample = Sample(np.array(one[0][0][1]), np.array(one[0][0][2]), RowRef("d", 1))
    assert "question 0<|im_end|>" in text_of(sample)


def test_chunks_are_bounded_in_rows_and_bytes(monkeypatch):
    monkeypatch.setattr(workers, "CHUNK_ROWS", 3)
    monkeypatch.setattr(workers, "CHUNK_BYTES", 100)
    rows = [task(b"x" * size) for size in (1, 1, 1, 1, 200, 60, 60, 1)]
    sizes = [[len(t.row.value) for t in chunk] for chunk in chunked(rows)]
    assert sizes == [[1, 1, 1], [1, 200], [60, 60], [1]]


def test_a_killed_process_is_an_error_with_a_hint(tmp_path):
    class Deadly:
        def sequences(self, conversation):
            os.kill(os.getpid(), signal.SIGKILL)

    chunks = [[task(chat("a", "b"))]] * 3
    with pytest.raises(DataError, match="dataset_num_proc"):
        list(encode_all(encoder(template=Deadly()), chunks, processes=2))


def test_reader_error_ends_the_processes():
    def chunks():
        yield [task(chat("a", "b"))]
        raise DataError("the rest is missing")

    with pytest.raises(DataError, match="the rest is missing"):
        list(encode_all(encoder(), chunks(), processes=2))


def test_the_environment_is_as_before(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    list(encode_all(encoder(), [[task(chat("a", "b"))]], processes=2))
    assert "TOKENIZERS_PARALLELISM" not in os.environ


SLOW_RUN = """
    import os, signal, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    from xtuner.data.sources.rows import Task
    from xtuner.data.tokenize.row_encoder import Encoder
    from xtuner.data.tokenize.workers import encode_all
    from xtuner.algorithms import sft
    from xtuner.data.formats import load
    from xtuner.data.sources.rows import RawRow
    from xtuner.types import Conversation

    class Slow:
        def sequences(self, conversation):
            os.write(1, f"{os.getpid()}\\n".encode())
            time.sleep(0.5)
            raise ValueError

    row = {"input": "a", "output": "b"}
    chunks = ([Task(0, RawRow(1, row, 0))] for _ in range(1000))
    format = load("sql").__class__(**{**vars(load("sql")), "convert": lambda row: Conversation(())})
    list(encode_all(Encoder([format], Slow(), None, sft.Algorithm()), chunks, processes=2))
"""


def runs(pid):
    """Whether the process exists and has not ended; its parent may never reap it."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=lambda stop: stop.name)
def test_no_process_outlives_its_parent(stop):
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_RUN)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        workers = set()
        while len(workers) < 2:
            line = run.stdout.readline()
            assert line, run.stderr.read()
            workers.add(int(line))
        assert run.pid not in workers
        run.send_signal(stop)
        run.wait()
    while any(map(runs, workers)):  # endless if one still runs: pytest ends the test
        time.sleep(0.05)
