"""Files of examples: which formats are read, what a folder or a pattern stands for, whose a file is."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedtune.data.json_rows import Rows, document_rows, line_rows
from fedtune.data.opening import PACKED, lines_of, not_utf8, opened, packing_of, readable
from fedtune.data.places import is_hub_name
from fedtune.errors import InputError

FORMATS = {
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".ipc": "Arrow",
    ".feather": "Arrow",
    ".txt": "text",
}
_COLUMNAR = ("Parquet", "Arrow")  # packed inside, where they are
READ = f"{', '.join(FORMATS)} (text ones also with {' or '.join(PACKED)} behind)"
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
}
_MAGIC = re.compile(r"[*?\[]")


def format_of(name: str) -> str | None:
    """The format that a file's name says, whatever the case of its suffix; None of no such name."""
    suffix = Path(name.lower().removesuffix(packing_of(name))).suffix
    return FORMATS.get(suffix)


def stem_of(name: str) -> str:
    """A file's name without what says its format."""
    bare = name[: -len(packing_of(name)) or None]
    return bare[: -len(Path(bare).suffix) or None] if format_of(name) else name


def rows_in(file: Path, split: str = "train") -> Rows:
    """The rows of one file.

    Args:
        file: Its suffix says what it is.
        split: Of a .json file whose object holds several arrays; all other files have one part only.

    Raises:
        InputError: It is missing, of no known format, damaged, or in another encoding.
    """
    name, found = str(file), format_of(file.name)
    if found is None:
        raise InputError(f"{name}: this kind of file is not read; read are {READ}.")
    if found in _COLUMNAR and packing_of(name):
        raise InputError(f"{name}: {found} files are packed inside; unpack this one.")
    if found != "JSON" and split != "train":
        raise InputError(f'{name}: a file has no split "{split}"; give the file of that part.')
    if found == "Parquet":
        from fedtune.data.tables import parquet_rows

        yield from parquet_rows(file, name)
        return
    if found == "Arrow":
        from fedtune.data.tables import arrow_rows

        yield from arrow_rows(file, name)
        return
    with opened(file, name) as stream:
        if found == "JSON":
            yield from document_rows(stream, name, split)
        elif found == "JSON Lines":
            yield from line_rows(stream, name)
        elif found == "text":
            yield from _paragraphs(lines_of(stream, name), name)
        else:
            from fedtune.data.tables import Csv

            yield from Csv(stream, name, "\t" if found == "TSV" else None).rows()


def _paragraphs(lines: Iterator[tuple[int, bytes]], name: str) -> Rows:
    """A document a paragraph: the lines between blank ones, as `{"text": ...}`."""
    begun, paragraph = 0, list[str]()
    for number, line in lines:
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}:{number}: {not_utf8(line, error.start)}.") from None
        if text.strip():
            begun = begun or number
            paragraph.append(text)
        elif paragraph:
            yield f"{name}:{begun}", {"text": "\n".join(paragraph)}
            begun, paragraph = 0, []
    if paragraph:
        yield f"{name}:{begun}", {"text": "\n".join(paragraph)}


def is_pattern(source: str, base: Path) -> bool:
    """Whether a source is a pattern of files' names: what exists, or names a data set of the hub, is none."""
    return bool(_MAGIC.search(source)) and not (base / source).exists() and not is_hub_name(source, base)


def is_here(source: str, base: Path = Path(".")) -> bool:
    """Whether a source is on this machine: bundled, a file, a folder or a pattern that something fits."""
    if source == "bundled" or (base / source).exists():
        return True
    return is_pattern(source, base) and bool(matching(source, base))


def matching(pattern: str, base: Path) -> list[Path]:
    """What fits a pattern, sorted: files and folders; `**` stands for any folders, links not followed."""
    path = base / pattern
    parts = path.parts
    fixed = next(at for at, part in enumerate(parts) if _MAGIC.search(part))
    start = Path(*parts[:fixed]) if fixed else Path(".")
    with readable(str(start)):
        found = sorted(start.glob(str(Path(*parts[fixed:]))))
    hidden = parts[-1].startswith(".")
    return [one for one in found if hidden or not any(p.startswith(".") for p in one.parts[fixed:])]


@dataclass(frozen=True)
class Found:
    """The files that a folder or a pattern stands for.

    Attributes:
        files: Those that are read, in the order of their names.
        other_splits: Those that are of other parts by their names.
        others: Names of those of no known format.
    """

    files: tuple[Path, ...]
    other_splits: tuple[Path, ...] = ()
    others: tuple[str, ...] = ()


def files_in(folder: Path, split: str) -> Found:
    """The files of a folder and of all folders in it that are read for a part of the data.

    A file is of a part if its name, or that of a folder in `folder`, has the word: `train-00001.parquet`,
    `test/a.jsonl`, `dev.csv`. Files without such a word are of `train`, if no file has that. Names that begin
    with . or _ do not count.

    Raises:
        InputError: There is none, or a link leads round in a circle.
    """
    known, others = list[Path](), list[str]()
    for file in _walk(folder, ()):
        if format_of(file.name):
            known.append(file)
        else:
            others.append(str(file.relative_to(folder)))
    if not known:
        there = f"; it has {', '.join(others[:5])}" if others else " and is empty"
        raise InputError(f"{folder}: this folder has no file of examples{there}. Read are {READ}.")
    part = {file: part_of(file.relative_to(folder)) for file in known}
    wanted = next((ours for ours, words in _SPLITS.items() if split in words), split)
    chosen = [file for file in known if part[file] == wanted]
    if not chosen and wanted == "train":
        chosen = [file for file in known if part[file] is None]
    if not chosen:
        parts = ", ".join(sorted({str(one) for one in part.values() if one})) or "no part of the data"
        raise InputError(
            f'{folder}: no file in this folder is named for the split "{split}"; its files are named for '
            f"{parts}. Set the split, or give a file."
        )
    left = tuple(file for file in known if file not in set(chosen))
    return Found(tuple(chosen), left, tuple(others))


def part_of(path: Path) -> str | None:
    """The part of the data that a file is of by its name or a folder's: train, test, validation or None."""
    words = re.split(r"[^a-z]+", str(path.with_name(stem_of(path.name))).lower())
    found = [ours for word in words for ours, theirs in _SPLITS.items() if word in theirs]
    return found[-1] if found else None


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        raise InputError(f"{folder}: this link leads back to {real}, which it is in; remove it.")
    with readable(str(folder)):
        entries = sorted(folder.iterdir())
    for entry in entries:
        if entry.name.startswith((".", "_")):
            continue
        with readable(str(entry)):
            inside = entry.is_dir()
        if inside:
            yield from _walk(entry, (*above, real))
        else:
            yield entry


def clients_in(source: str, base: Path, setting: str) -> dict[str, Path]:
    """Each client's file or folder, by its name, in the order of the names.

    Args:
        source: A folder with a file or folder a client, or a pattern that fits one a client.
        base: The folder that a relative path starts from.
        setting: What an error calls `source`.

    Returns:
        A client's name is that of its file without suffix, or of its folder; where a pattern finds the same
        file in several folders, that of the folder above.

    Raises:
        InputError: It is no folder or pattern, nothing is there, or two would have one name.
    """
    if is_pattern(source, base):
        there = matching(source, base)
        if not there:
            raise InputError(f"{setting}: nothing fits {base / source}. Paths start from {base.resolve()}.")
    elif (base / source).is_dir():
        with readable(str(base / source)):
            there = sorted((base / source).iterdir())
        there = [one for one in there if not one.name.startswith((".", "_"))]
        there = [one for one in there if one.is_dir() or format_of(one.name)]
        if not there:
            raise InputError(f"{setting}: {base / source} has no file and no folder of a client.")
    else:
        what = "is a file" if (base / source).is_file() else "is not there"
        raise InputError(
            f"{setting}: {base / source} {what}; with data.clients: files it is a folder with a file or a "
            "folder a client, or a pattern as sites/*.jsonl"
        )
    names = [one.name if one.is_dir() else stem_of(one.name) for one in there]
    above = [one.parent.name for one in there]
    if len(set(names)) < len(names) and len(set(above)) == len(above):
        names = above  # sites/north/train.jsonl, sites/south/train.jsonl
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        same = [str(one) for name, one in zip(names, there, strict=True) if name == twice[0]]
        raise InputError(
            f'{setting}: two clients would be called "{twice[0]}": {same[0]} and {same[1]}; rename one'
        )
    return dict(sorted(zip(names, there, strict=True)))


def left_over(source: Path, taken: Mapping[str, Path]) -> list[str]:
    """What stands in a folder of clients and is none: names of files of no known format."""
    with readable(str(source)):
        names = sorted(one.name for one in source.iterdir())
    mine = {one.name for one in taken.values()}
    return [name for name in names if name not in mine and not name.startswith((".", "_"))]
