"""Reads parquet and arrow files in a separate process, which a malformed file may crash.

Run as a script. Requests are lines of JSON on stdin, ``{"open": PATH}`` or ``{}`` for the next
rows. Each answer on stdout is its length in 8 bytes and a pickle: ``{"rows", "share"}``,
``{"error"}``, or ``{"refused"}`` for a sound file. A row that cannot be read is ``(column, reason,
detail)``, and no rows are the end of the file. Imports nothing of xtuner, so that it starts in the
time that pyarrow takes.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

_BATCH_ROWS = 64
_SMALL, _RATIO = 64_000_000, 1_000
"""A file that expands to more bytes than these and to this many times its size is refused: natural
text shrinks to a tenth, and tables with repeated columns to a hundredth."""


class _ExpansionError(Exception):
    """A small file expands to implausibly many bytes."""


class _Pickler(pickle.Pickler):
    """Pickles anything but plain values as text."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if isinstance(obj, datetime.datetime):
            if kind is not datetime.datetime:  # of pandas, which pyarrow gives for nanoseconds
                obj = getattr(obj, "to_pydatetime")(warn=False)  # noqa: B009
            offset = obj.utcoffset()
            zone = None if offset is None else datetime.timezone(offset)
            return obj.replace(tzinfo=zone).__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        if isinstance(obj, type) or kind.__module__ in ("datetime", "decimal"):
            return NotImplemented
        return str, (str(obj),)


def answers(path: str) -> Iterator[dict[str, Any]]:
    """The answers for one file."""
    try:
        if path.lower().endswith(".arrow"):
            yield from _of_arrow(path)
            return
        import pyarrow.parquet

        size = os.path.getsize(path)
        with pyarrow.parquet.ParquetFile(path) as table:
            groups = range(table.metadata.num_row_groups)
            expanded = sum(table.metadata.row_group(i).total_byte_size for i in groups)
            _check_expansion(size, expanded)
            done, total, expanded = 0, table.metadata.num_rows, 0
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                done += batch.num_rows
                expanded += batch.nbytes
                _check_expansion(size, expanded)
                yield {"rows": _rows(batch), "share": done / max(1, total)}
        yield {"rows": [], "share": 1.0}
    except _ExpansionError as error:
        yield {"refused": str(error)}
    except Exception as error:  # a malformed file can cause any error
        yield {"error": " ".join(str(error).split()) or repr(error)}


def _check_expansion(size: int, expanded: int) -> None:
    """Refuse a file of `size` bytes that expands to implausibly many."""
    if expanded > max(_SMALL, _RATIO * size):
        raise _ExpansionError(
            f"it expands from {size / 1e6:,.2f} MB to {expanded / 1e6:,.0f} MB or more, over "
            f"{_RATIO:,} times its size, which real data never do; if this is intended, write it "
            "without compression"
        )


def _of_arrow(path: str) -> Iterator[dict[str, Any]]:
    """The answers for an arrow file in the stream format, which datasets writes, or the file
    format."""
    import pyarrow

    with open(path, "rb") as file:
        size = max(1, os.path.getsize(path))
        if file.read(6) == b"ARROW1":
            with pyarrow.ipc.open_file(path) as table:
                batches: Any = (table.get_batch(i) for i in range(table.num_record_batches))
                yield from _in_batches(batches, lambda: 0.5)
        else:
            file.seek(0)
            with pyarrow.ipc.open_stream(file) as stream:
                yield from _in_batches(stream, lambda: file.tell() / size)
    yield {"rows": [], "share": 1.0}


def _in_batches(batches: Any, share: Callable[[], float]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield {"rows": _rows(batch.slice(start, _BATCH_ROWS)), "share": min(1.0, share())}


def _rows(batch: Any) -> list[Any]:
    try:
        return list(batch.to_pylist())
    except Exception:  # one value that Python cannot represent: find its row
        return [_row(batch, number) for number in range(batch.num_rows)]


def _row(batch: Any, number: int) -> Any:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[number].as_py()
        except Exception as error:
            kind = "is not UTF-8 text" if isinstance(error, UnicodeError) else "cannot be read"
            detail = f"{column.type}: {' '.join(str(error).split())}"
            return (name, f"{kind}; fix the value, or remove the column", detail)
    return row


def main() -> None:
    """Answer requests until stdin ends."""
    current: Iterator[dict[str, Any]] = iter(())
    out = sys.stdout.buffer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "open" in request:
            current = answers(request["open"])
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=5).dump(next(current, {"rows": [], "share": 1.0}))
        content = buffer.getvalue()
        out.write(len(content).to_bytes(8, "little") + content)
        out.flush()


if __name__ == "__main__":
    main()
