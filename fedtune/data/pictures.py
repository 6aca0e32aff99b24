"""Pictures with captions: a folder of them, as people and the hub have it, or the bundled shapes.

A caption is that of `metadata.jsonl`, `.csv` or `.parquet` (`file_name` and `text`), of a `.txt` beside the
picture, or one for all (`data.pictures.caption`, in which {folder} stands for the name of the picture's
folder). The first folder below the source is an example's category, so that `partition: by-field` gives a
client each.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.data.encoded import Counts, Encoded, EncodedSet
from fedtune.data.examples import Example
from fedtune.data.files import clients_in
from fedtune.data.picture_folders import (
    ENDS,
    METADATA,
    files_below,
    passed_over,
    pictures_of,
    refuse_splits,
    written_captions,
)
from fedtune.data.reading import NONE_THERE, Reading
from fedtune.data.shapes import SIZE, subject_pictures
from fedtune.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MOST_PIXELS = 64_000_000  # of one picture: 256 MB once decoded; a few kilobytes of a bomb decode to more
BUNDLED = "bundled"
_LIBRARY = "pictures need Pillow; install fedtune[image]"


@dataclass(frozen=True, slots=True)
class Picture(Encoded):
    """One picture with its caption's tokens; counts as one trained label, as a classifier's example does.

    Attributes:
        pixels: uint8 (3, height, width).
    """

    pixels: Tensor | None = None


@dataclass(frozen=True)
class Frame:
    """The size that pictures are brought to.

    Attributes:
        side: Pixels of a square.
        crop: As `data.pictures.crop`.
        unit: What each side must be a multiple of.
    """

    side: int
    crop: str = "center"
    unit: int = 1

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height for a picture of such a size: the square, or with `bucket` what is nearest to it.

        A bucket has sides of a multiple of `unit`, at most as many pixels as the square, and is at most twice
        as long as broad (Stable Diffusion's and NovelAI's "aspect ratio bucketing").
        """
        if self.crop != "bucket":
            return self.side, self.side
        wanted = math.log(width / height)
        found = [(w, self._other(w)) for w in range(self.unit, 2 * self.side + 1, self.unit)]
        found += [(high, wide) for wide, high in found]
        fitting = sorted({one for one in found if min(one) and max(one) <= 2 * min(one)})
        fitting = fitting or [(self.side, self.side)]
        return min(fitting, key=lambda one: (abs(math.log(one[0] / one[1]) - wanted), -one[0] * one[1]))

    def _other(self, side: int) -> int:
        return self.side**2 // side // self.unit * self.unit


class PictureList(Sequence[Picture]):
    """Pictures of one owner.

    Args:
        items: The pictures.
        others: Makes pictures of the subjects' class, for prior preservation; asked once, when one is needed.
    """

    def __init__(
        self, items: Sequence[Picture], others: Callable[[], Sequence[Picture]] | None = None
    ) -> None:
        self._items, self._others = list(items), others

    @cached_property
    def of_class(self) -> Sequence[Picture]:
        """Pictures of the subjects' class; empty without prior preservation."""
        return self._others() if self._others is not None else ()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: Any) -> Any:
        return self._items[place]


def load_pictures(source: str, split: str, caption: str | None, reading: Reading) -> list[Example]:
    """The pictures of a source as examples: `instruction` is the caption, `output` the SHA-256 of the file.

    Args:
        source: "bundled", or a folder.
        split: "train" or "test", of the bundled ones.
        caption: For pictures that have none of their own; {folder} is the name of their folder.
        reading: Whether bad ones are skipped; is told what was read.

    Raises:
        InputError: No folder, none in it, or one that is broken, animated, too large or has no caption.
    """
    if source == BUNDLED:
        found = [
            Example(
                subject.caption(colour),
                output=hashlib.sha256(pixels.tobytes()).hexdigest(),
                category=subject.name,
                picture=f"{BUNDLED}:{split}:{place}",
            )
            for place, (subject, colour, pixels) in enumerate(subject_pictures(split))
        ]
        reading.lines.append(f"{reading.what}: {len(found)} drawn pictures from the bundled set")
        return found
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{reading.what}: {folder} is no folder; pictures are read from a folder on this machine, got "
            f"{source}"
        )
    below = files_below(folder)
    files = pictures_of(below)
    if not files:
        raise InputError(f"{reading.what}: {folder} {NONE_THERE} Pictures end in {', '.join(sorted(ENDS))}.")
    refuse_splits(folder, files)
    written, examples, bare = written_captions(folder, below), list[Example](), list[str]()
    for file in files:
        place = str(file.relative_to(folder))
        everyone = None if caption is None else _named(caption, file.parent.name)
        said = written.get(file, everyone)
        if not said:
            bare.append(place)
            continue
        try:
            open_picture(file)
        except InputError as error:
            if not reading.skip:
                raise
            reading.skipped.append((place, str(error).partition(": ")[2]))
            continue
        parents = file.relative_to(folder).parts[:-1]
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        examples.append(
            Example(said, output=digest, category=parents[0] if parents else "", picture=str(file))
        )
    if bare:
        raise InputError(
            f"{reading.what}: {len(bare):,} of {len(files):,} pictures have no caption, the first is "
            f"{bare[0]}. Write them into {METADATA[0]} (file_name and text) or into a .txt beside each, or "
            'give one for all in data.pictures.caption, as "a photo of sks dog"'
        )
    if not examples:
        raise InputError(f"{reading.what}: {folder} {NONE_THERE} All its pictures are bad.")
    over = passed_over(below)
    others = f"; no pictures that are read: {over}" if over else ""
    reading.lines.append(f"{reading.what}: {len(examples):,} pictures from {folder}{others}")
    return examples


def pictures_by_client(source: str, caption: str | None, reading: Reading) -> dict[str, list[Example]]:
    """The pictures of every folder in a source, each read as a client's own, by the folder's name.

    Args:
        source: A folder with a folder a client, or a pattern that fits folders.
        caption: As of `load_pictures`.
        reading: As of `load_pictures`.

    Raises:
        InputError: There is no such folder, a picture lies beside them, or as `load_pictures`: a client has
            no picture.
    """
    place = Path(source)
    beside = sorted(place.iterdir()) if place.is_dir() else []
    if own := [f for f in beside if f.suffix.lower() in ENDS or f.name in METADATA]:
        raise InputError(
            f"{reading.what}: {own[0]} is of no client; with data.clients: files pictures and their captions "
            "lie in the folder of a client. Move it into one, or take partition: {name: iid}"
        )
    there = {n: f for n, f in clients_in(source, Path("."), reading.what).items() if f.is_dir()}
    if not there:
        raise InputError(f"{reading.what}: {source} has no folder of a client.")
    mine, found = reading.another(), dict[str, list[Example]]()
    for name, folder in there.items():
        own_reading = reading.another()
        own_reading.what = f"{reading.what}, client {name}"
        found[name] = load_pictures(str(folder), "train", caption, own_reading)
        mine.add(own_reading)
    reading.add(mine)
    count = sum(map(len, found.values()))
    reading.lines.append(f"{reading.what}: {count:,} pictures of {len(found)} clients from {source}")
    return found


def encode_pictures(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    frame: Frame,
    tokens: int,
) -> EncodedSet:
    """Pictures at their size and their captions as token ids, padded to the full length.

    Args:
        examples: As `load_pictures` gives them.
        tokenizer: Of the pipeline.
        frame: Their size.
        tokens: Of a caption with its start and its end; longer ones are cut and counted.

    Raises:
        InputError: A picture is not there any more, or is broken.
    """
    import torch

    items, cut = list[Picture](), 0
    drawn: dict[str, list[Any]] = {}
    for example in examples:
        ids, was_cut = caption_ids(tokenizer, example.instruction, tokens)
        cut += was_cut
        if example.picture.startswith(f"{BUNDLED}:"):
            _, split, place = example.picture.split(":")
            if split not in drawn:
                drawn[split] = [pixels for _, _, pixels in subject_pictures(split)]
            image = as_image(drawn[split][int(place)])
        else:
            image = open_picture(Path(example.picture))
        pixels = torch.from_numpy(np.asarray(sized(image, frame)).transpose(2, 0, 1).copy())
        items.append(Picture(ids, (0,), pixels=pixels))
    digests = [(example.instruction, example.output) for example in examples]
    counts = Counts(examples=len(items), cut=cut, duplicates=len(digests) - len(set(digests)))
    return EncodedSet(PictureList(items), counts)  # type: ignore[arg-type]  # a sequence, as it is used


def captioned(caption: str, example: Example) -> str:
    """A caption for all, with the name of an example's folder, of a drawn one its category, for {folder}."""
    drawn = example.picture.startswith(f"{BUNDLED}:")
    return _named(caption, example.category if drawn else Path(example.picture).parent.name)


def caption_ids(
    tokenizer: PreTrainedTokenizerBase, caption: str, tokens: int
) -> tuple[tuple[int, ...], bool]:
    """A caption's token ids, padded to `tokens`, and whether it was longer."""
    whole = tokenizer(caption, truncation=False, verbose=False)["input_ids"]
    ids = tokenizer(caption, truncation=True, max_length=tokens, padding="max_length")["input_ids"]
    return tuple(ids), len(whole) > tokens


def open_picture(file: Path) -> Image:
    """A picture as RGB, upright. 16-bit grey is brought to 8 bits; what is transparent becomes white.

    Of a phone's JPEG that holds several pictures (MPO) it is the first.

    Raises:
        InputError: It is broken, animated, of floating-point numbers, or has more than `MOST_PIXELS`.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise InputError(_LIBRARY) from error
    try:
        # an open file and no name, since Pillow 13 reads grey TIFFs that are turned from a map, in wrong rows
        ours = warnings.catch_warnings(action="ignore")  # of many pixels we say it ourselves
        with file.open("rb") as opened, ours, Image.open(opened) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise InputError(
                    f"{file}: it has {width} x {height} pixels, more than {MOST_PIXELS:,}; make it smaller"
                )
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a phone's JPEG, with previews or depths behind it
                raise InputError(f"{file}: it is animated, with {frames} frames; save one of them")
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits, or 32 that hold 16
                grey = np.asarray(upright, dtype=np.int64)
                return Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
            if upright.mode == "F":
                raise InputError(
                    f"{file}: its pixels are floating-point numbers, and which of them is white is not said; "
                    "save it with 8 or 16 bits"
                )
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                clear = upright.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
            return upright.convert("RGB")
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{file}: it has too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{file}: it is no picture that can be read: its content is of no kind that is known"
        ) from error
    except Exception as error:  # of a damaged file a decoder may raise anything, TypeError among it
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file}: it is no picture that can be read: {said}") from error


def picture_size(example: Example) -> tuple[int, int]:
    """Width and height of an example's picture, upright. Raises InputError where it cannot be read."""
    if example.picture.startswith(f"{BUNDLED}:"):
        return SIZE, SIZE
    return open_picture(Path(example.picture)).size


def sized(image: Image, frame: Frame) -> Image:
    """A picture of the frame's size.

    Args:
        image: RGB.
        frame: Its `crop` says how: `center` and `bucket`: the largest part in the middle of that form.
            `stretch`: all of it. `pad`: all of it, with white around.
    """
    from PIL import Image, ImageOps

    how, size = Image.Resampling.BICUBIC, frame.size(*image.size)
    if frame.crop == "stretch":
        return image.resize(size, how)
    if frame.crop == "pad":
        return ImageOps.pad(image, size, how, color="white")
    return ImageOps.fit(image, size, how)


def as_image(pixels: Any) -> Image:
    """A picture of numbers in [-1, 1], (3, height, width)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(_LIBRARY) from error
    return Image.fromarray(((pixels + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0))


def _named(caption: str, folder: str) -> str:
    return caption.replace("{folder}", folder.replace("_", " "))
