"""What lies in a folder of pictures: the pictures, the captions written for them, and what is neither.

Folders are looked through with all folders in them, through links too. What begins with a dot is hidden, and
is not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fedtune.data.files import rows_in
from fedtune.errors import InputError

ENDS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as the hub's image folders have them
SPLITS = ("train", "test", "validation", "valid", "val")  # folders of the hub's image folders


def files_below(folder: Path) -> list[Path]:
    """All files of a folder, in the order of their names.

    Raises:
        InputError: It, or a folder in it, cannot be looked into.
    """
    return sorted(_below(folder, ()))


def _below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    try:
        real, inside = folder.resolve(), list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    for one in inside if real not in above else ():  # a link may lead back
        if one.name.startswith("."):
            continue
        if one.is_dir():
            yield from _below(one, (*above, real))
        else:
            yield one


def pictures_of(files: Iterable[Path]) -> list[Path]:
    """Those that are pictures by their ends."""
    return [file for file in files if file.suffix.lower() in ENDS]


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder and of all folders in it, by their ends, in the order of their names."""
    return pictures_of(files_below(folder))


def passed_over(files: Iterable[Path]) -> str:
    """The ends of files that are neither pictures nor captions, counted: `1 .avif, 2 .heic`; "" of none."""
    files = list(files)
    stems = {file.with_suffix("") for file in pictures_of(files)}
    ends = Counter(
        file.suffix.lower() or "without an end"
        for file in files
        if file.suffix.lower() not in ENDS
        and file.name not in METADATA
        and not (file.suffix.lower() == ".txt" and file.with_suffix("") in stems)
    )
    return ", ".join(f"{count:,} {end}" for end, count in sorted(ends.items()))


def refuse_splits(folder: Path, files: Sequence[Path]) -> None:
    """Raises InputError for pictures of training and of a test beside each other: all would be trained on."""
    tops = {file.relative_to(folder).parts[0] for file in pictures_of(files)}
    if "train" in tops and len(tops) > 1 and tops <= set(SPLITS):
        other = next(name for name in SPLITS[1:] if name in tops)
        raise InputError(
            f"{folder} has pictures for training and others in a folder {other}; set data.train to "
            f"{folder / 'train'}, and data.holdout.source to {folder / other}"
        )


def written_captions(folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """Captions by picture: of every file of metadata, and of a `.txt` beside a picture that is in none.

    Args:
        folder: That was looked through.
        files: All that is in it.

    Returns:
        An empty text where a `.txt` is empty.

    Raises:
        InputError: Metadata are malformed, or name a picture twice, or one that is not there; a text cannot
            be read.
    """
    found: dict[Path, str] = {}
    for file in (file for file in files if file.name in METADATA):
        for place, row in rows_in(file):
            if isinstance(row, InputError):
                raise row
            name, text = (row.get(key) if isinstance(row, Mapping) else None for key in ("file_name", "text"))
            if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
                raise InputError(f'{place}: it needs texts for "file_name" and "text", got {row!r:.80}')
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(f"{place}: {name:.80} is outside of the folder of this file")
            picture = file.parent / name
            if found.setdefault(picture, text.strip()) != text.strip():
                raise InputError(
                    f'{place}: {name:.80} has another caption already, "{found[picture]:.40}"; leave one out'
                )
    pictures = pictures_of(files)
    if lost := sorted(set(found) - set(pictures)):
        name, there = lost[0].relative_to(folder), lost[0].is_file()
        why = f"which is no picture by its end; read are {', '.join(sorted(ENDS))}" if there else ""
        raise InputError(f"{folder}: its metadata name {name}, {why or 'which is not there'}")
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    for picture in pictures:
        beside = texts.get(picture.with_suffix(""))
        if beside is not None and picture not in found:
            try:
                found[picture] = beside.read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{beside} cannot be read: {error}") from error
    return found
