"""Files opened for reading, packed or not: line by line, none longer than LINE bytes, and text in UTF-8.

What is no ordinary file (a pipe, a device) is never opened, since reading it may have no end.
"""

from __future__ import annotations

import gzip
import io
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.resources.abc import Traversable
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from fedtune.errors import InputError, system_error

PACKED = {".gz": "gzip", ".zst": "zstd"}
LINE = 2**26  # bytes of one row's text: what is longer is no row, or a small file that unpacks to a huge one
WHOLE = 2**30  # bytes of a packed file that has to be read as one
_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}


def packing_of(name: str) -> str:
    """The last suffix of a file's name where it says that the file is packed, in small letters; else ""."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix in PACKED else ""


def check_ordinary(file: Path) -> None:
    """Raises InputError if there is no such file, or if it is something else: a folder, a pipe, a device."""
    try:
        about = file.stat()
    except FileNotFoundError:
        link = " It is a link to something that is not there." if file.is_symlink() else ""
        raise InputError(f"{file}: there is no such file.{link} Paths start from {Path.cwd()}.") from None
    except OSError as error:  # no right to look into the folder, links in a circle
        raise InputError(f"{file}: cannot be read: {error.strerror or error}.") from error
    if not stat.S_ISREG(about.st_mode):
        what = "is a folder" if stat.S_ISDIR(about.st_mode) else "a pipe, a socket or a device"
        raise InputError(f"{file}: is not a file ({what}); give a file with the examples.")


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Inside, what goes wrong with reading or unpacking a file is an InputError that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{name}: the packed file is damaged or not whole: {error}.") from error
    except OSError as error:
        if packing_of(name) == ".zst" and error.errno is None:  # of pyarrow
            raise InputError(f"{name}: the packed file is damaged or not whole: {error}.") from error
        raise InputError(
            f"{name}: cannot be read: {system_error(error) if error.errno is None else error.strerror}."
        ) from error


@contextmanager
def opened(file: Path | Traversable, name: str) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked as its name says.

    Raises:
        InputError: It cannot be read, is damaged, or is no ordinary file.
    """
    if isinstance(file, Path):
        check_ordinary(file)
    with readable(name):
        packing = packing_of(name)
        if packing == ".zst":
            yield from _unpacked(Path(str(file)))
        elif packing == ".gz":
            with file.open("rb") as raw, gzip.GzipFile(fileobj=cast(Any, raw)) as inner:
                yield cast(IO[bytes], io.BufferedReader(cast(Any, inner), 2**16))
        else:
            with file.open("rb") as plain:
                yield plain


def _unpacked(file: Path) -> Iterator[IO[bytes]]:
    import pyarrow  # its own zstd: Python has none before 3.14

    with pyarrow.OSFile(str(file)) as raw, pyarrow.CompressedInputStream(raw, "zstd") as inner:
        yield cast(IO[bytes], io.BufferedReader(cast(Any, inner), 2**16))


def lines_of(stream: IO[bytes], name: str, begun: Sequence[bytes] = ()) -> Iterator[tuple[int, bytes]]:
    """The lines of a text with their numbers from 1, as bytes with their ends; the first without its mark.

    They end at line feeds only: str.splitlines would also cut at U+2028, which may stand in a text.

    Args:
        stream: The text.
        name: What it is called.
        begun: Lines that were read of it already.

    Raises:
        InputError: A line has more than LINE bytes, or the text is in UTF-16 or UTF-32.
    """
    for number, line in enumerate(chain(begun, iter(partial(stream.readline, LINE + 1), b"")), start=1):
        if number == 1:
            refuse_other_encoding(line, name)
            line = line.removeprefix(_MARK)
        if len(line) > LINE:
            raise InputError(
                f"{name}:{number}: this line has more than {LINE // 2**20} MiB; a line must be one row. Is "
                "it text, with a line a row?"
            )
        yield number, line


def rest_of(stream: IO[bytes], name: str, begun: bytes) -> bytes:
    """All that is left of a file, behind what was read of it; of a packed one at most WHOLE bytes."""
    if not packing_of(name):
        return begun + stream.read()
    whole = begun + stream.read(WHOLE + 1)
    if len(whole) > WHOLE:
        raise InputError(
            f"{name}: unpacked it has more than {WHOLE // 2**30} GiB and has to be read as one; write it as "
            "JSON Lines, one object a line"
        )
    return whole


def refuse_other_encoding(start: bytes, name: str) -> None:
    """Raises InputError if the first line of a text is in UTF-16 or UTF-32, or no text."""
    found = next((one for mark, one in _OTHER_MARKS.items() if start.startswith(mark)), "")
    sample = start[:1000]
    if not found and (zeros := [at for at, byte in enumerate(sample) if not byte]):
        odd = sum(at % 2 for at in zeros)
        if len(zeros) > 0.9 * len(sample) or min(odd, len(zeros) - odd) > 0.1 * len(zeros):
            raise InputError(f"{name}: not a text: it holds bytes of value 0. Is it another kind of file?")
        found = "UTF-16LE" if 2 * odd > len(zeros) else "UTF-16BE"
    if found:
        raise InputError(
            f"{name}: this text is in {found.rstrip('BLE')} ({found}), and UTF-8 is read. Save it as UTF-8, "
            f"or convert it: iconv -f {found} -t UTF-8 FILE > NEW"
        )


def not_utf8(text: bytes, at: int) -> str:
    """What is said of a text that is not UTF-8: what it looks like instead, and how it is converted.

    Args:
        text: One line or the whole.
        at: Of the first byte that does not fit.
    """
    byte, around = text[at], text[max(0, at - 1) : at] + text[at + 1 : at + 2]
    said = f"not UTF-8 text: byte 0x{byte:02x}"
    if byte >= 0x80 and all(other < 0x80 for other in around):
        letter = bytes([byte]).decode("cp1252", errors="replace")
        which = "Latin-1 or Windows-1252" if byte >= 0xA0 else "Windows-1252"
        return (
            f'{said}, which is "{letter}" in {which}. Save the file as UTF-8, or convert it: '
            "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        )
    return f"{said}; save the file as UTF-8"
