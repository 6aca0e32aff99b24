"""Rows of tables: CSV and TSV with Python's reader, Parquet and Arrow with pyarrow, saved data sets.

Row numbers count from 0, as `datasets` and pandas count; lines of a text from 1.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from fedtune.data.json_rows import Rows, whole_document
from fedtune.data.opening import LINE, check_ordinary, lines_of, not_utf8
from fedtune.errors import InputError

AT_ONCE = 1024  # rows that are Python objects at a time
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_LOOKED_AT = 20  # records by which a separator is found


class Csv:
    """A file of separated values.

    Args:
        stream: The file.
        name: What it is called.
        separator: None: it is found, among `SEPARATORS`.

    Attributes:
        separator: What separates the cells.
    """

    def __init__(self, stream: IO[bytes], name: str, separator: str | None = None) -> None:
        self._name, self._lines = name, lines_of(stream, name)
        self._begun: list[tuple[int, bytes]] = []
        first = next(self._lines, None)
        if first is not None and (told := re.fullmatch(rb"sep=(.)\r?\n?", first[1])):  # Excel's own
            separator = told[1].decode("ascii", errors="replace")
        elif first is not None:
            self._begun = [first, *islice(self._lines, _LOOKED_AT)]
        self.separator = separator or self._found()

    def _found(self) -> str:
        """The one that cuts most records as the header; of several the one with most cells."""
        text = [line.decode("utf-8", errors="replace") for _, line in self._begun]

        def worth(separator: str) -> tuple[int, int]:
            try:
                rows = list(csv.reader(text, delimiter=separator))
            except csv.Error:
                return 0, 0
            wide = len(rows[0]) if rows else 0
            return (sum(len(row) == wide for row in rows[:-1]) if wide > 1 else 0), wide

        return max(SEPARATORS, key=worth)

    def rows(self) -> Rows:
        """A row a record, every cell a text; records without any text are skipped.

        Raises:
            InputError: There is no header, or two of its cells are equal.
        """
        numbers = list[int]()  # of the lines of one record
        reader = csv.reader(self._text(numbers), delimiter=self.separator, strict=True)
        header: list[str] | None = None
        for row in _in_parts(reader, self._name):
            place = f"{self._name}:{numbers[0]}"
            numbers.clear()
            if isinstance(row, csv.Error):
                unclosed = "unexpected end" in str(row)
                why = "a quote opens here and is not closed" if unclosed else str(row)
                yield place, InputError(f'{place}: {why}. A quote inside a quoted cell is written twice: "".')
            elif not any(cell.strip() for cell in row):
                continue
            elif header is None:
                header = self._header(row, place)
            elif (bad := self._bad(row, header, place)) is not None:
                yield place, bad
            else:
                yield place, {key: cell for key, cell in zip(header, row, strict=True) if key}

    def _text(self, numbers: list[int]) -> Iterator[str]:
        for number, line in chain(self._begun, self._lines):
            numbers.append(number)
            yield line.decode("utf-8", errors="surrogateescape")

    def _header(self, row: list[str], place: str) -> list[str]:
        header = [cell.strip() for cell in row]
        if broken := _surrogate(header):
            raise InputError(f"{place}: {broken}.")
        twice = [name for name, count in Counter(header).items() if count > 1 and name]
        if twice:
            raise InputError(f'{place}: the header has the column "{twice[0]}" twice; rename one of them.')
        return header

    def _bad(self, row: list[str], header: list[str], place: str) -> InputError | None:
        if len(row) != len(header):
            return InputError(
                f"{place}: this row has {len(row)} cells, and the header {len(header)} (separated by "
                f"{SEPARATORS.get(self.separator, self.separator)}). A cell with a separator or a line break "
                "in it stands in quotes."
            )
        broken = _surrogate(row)
        return InputError(f"{place}: {broken}.") if broken else None


def _surrogate(cells: Iterable[str]) -> str:
    """What is wrong with the first cell that was not UTF-8; "" if all are."""
    for cell in cells:
        if not cell.isascii():
            try:
                cell.encode()
            except UnicodeEncodeError:
                raw = cell.encode(errors="surrogateescape")
                try:
                    raw.decode()
                except UnicodeDecodeError as error:
                    return not_utf8(raw, error.start)
    return ""


def _in_parts(reader: Iterator[list[str]], name: str) -> Iterator[list[str] | csv.Error]:
    """What a reader gives; cells may be as long as a line. That limit is the process's, so it is put back."""
    while True:
        limit = csv.field_size_limit(LINE)
        try:
            row: list[str] | csv.Error = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field larger" in str(error):
                raise InputError(
                    f"{name}: a cell has more than {LINE // 2**20} MiB; is a quote not closed?"
                ) from None
            row = error
        finally:
            csv.field_size_limit(limit)
        yield row


@contextmanager
def _arrow(name: str) -> Iterator[None]:
    """Inside, what pyarrow says of a file is an InputError that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{name}: damaged, or not what its name says: {said[:300]}") from error


def parquet_rows(file: Path, name: str) -> Rows:
    """The rows of a Parquet file, some of which are in memory at a time."""
    check_ordinary(file)
    from pyarrow import parquet

    with _arrow(name), parquet.ParquetFile(str(file)) as table:
        _check_columns(table.schema_arrow.names, name)
        yield from _numbered((batch.to_pylist() for batch in table.iter_batches(AT_ONCE)), name)


def arrow_rows(file: Path, name: str) -> Rows:
    """The rows of an Arrow file: IPC files (Feather is one) and streams."""
    check_ordinary(file)
    import pyarrow
    from pyarrow import ipc

    with _arrow(name), pyarrow.memory_map(str(file)) as source:
        start = source.read(6)
        source.seek(0)
        if start.startswith(b"FEA1"):
            raise InputError(f"{name}: this is Feather in its first version; write it again with pyarrow.")
        if start.startswith(b"ARROW1"):
            whole = ipc.open_file(source)
            _check_columns(whole.schema.names, name)
            batches = (whole.get_batch(number) for number in range(whole.num_record_batches))
        else:
            stream = ipc.open_stream(source)
            _check_columns(stream.schema.names, name)
            batches = iter(stream)
        yield from _numbered(
            (
                batch.slice(start, AT_ONCE).to_pylist()
                for batch in batches
                for start in range(0, batch.num_rows, AT_ONCE)
            ),
            name,
        )


def _check_columns(names: Iterable[str], name: str) -> None:
    twice = [column for column, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f'{name}: it has the column "{twice[0]}" twice; rename one of them.')


def _numbered(parts: Iterable[list[Any]], name: str) -> Rows:
    number = 0
    for part in parts:
        for row in part:
            yield f"{name}: row {number}", row
            number += 1


def saved_splits(folder: Path) -> list[str] | None:
    """The splits of a folder that `save_to_disk` of the `datasets` library wrote.

    Returns:
        Empty: it holds one data set, without splits. None: the folder is no such folder.
    """
    if (folder / "dataset_dict.json").is_file():
        about = whole_document(folder / "dataset_dict.json")
        splits = about.get("splits") if isinstance(about, dict) else None
        if not isinstance(splits, list) or not splits:
            raise InputError(f'{folder}: damaged: dataset_dict.json has no list "splits"')
        return [str(split) for split in splits]
    return [] if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file() else None


def saved_rows(folder: Path, split: str) -> Rows:
    """The rows of such a folder.

    Raises:
        InputError: It is damaged, or has no such split.
    """
    splits = saved_splits(folder)
    if splits and split not in splits:
        raise InputError(f'{folder}: this data set has no split "{split}"; it has {", ".join(splits)}.')
    if not splits and split != "train":
        raise InputError(f'{folder}: this is one data set without splits, and so has no split "{split}".')
    place = folder / split if splits else folder
    import datasets  # heavy, and needed for this kind of source alone

    with _arrow(str(folder)):
        rows = datasets.load_from_disk(str(place)).with_format("arrow")
        parts = (part.to_pylist() for part in rows.iter(AT_ONCE))
        yield from _numbered(parts, str(place))
