"""Pictures with captions: what is read as what, what is refused, and the drawn shapes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image, PngImagePlugin

from fedtune.data.pictures import MOST_PIXELS, Frame, as_image, load_pictures, open_picture, sized
from fedtune.data.reading import Reading
from fedtune.data.shapes import (
    COLOURS,
    SHAPES,
    SUBJECTS,
    Figure,
    any_figure,
    backgrounds,
    figure_of,
    like,
    picture,
    subject_pictures,
)
from fedtune.errors import InputError
from fedtune.evaluation.shapes import read, right

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(file: Path, size: tuple[int, int] = (4, 2), colour: Any = RED, mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file)
    return file


def corner(image: Image.Image) -> Any:
    return image.getpixel((0, 0))


def test_captions_of_three_kinds(tmp_path: Path) -> None:
    plain(tmp_path / "a" / "one.png")
    plain(tmp_path / "a" / "two.jpg")
    plain(tmp_path / "big_dog" / "three.webp")
    (tmp_path / "a" / "metadata.jsonl").write_text('{"file_name": "one.png", "text": "of metadata"}\n')
    (tmp_path / "a" / "two.txt").write_text("of a text beside it\n")
    found = load_pictures(str(tmp_path), "train", "a photo of sks {folder}", Reading())
    said = [(one.instruction, one.category, Path(one.picture).name, one.form) for one in found]
    assert said == [
        ("of metadata", "a", "one.png", "picture"),
        ("of a text beside it", "a", "two.jpg", "picture"),
        ("a photo of sks big dog", "big_dog", "three.webp", "picture"),
    ]


@pytest.mark.parametrize("end", ["csv", "parquet"])
def test_captions_in_a_table_as_the_hub_has_them(tmp_path: Path, end: str) -> None:
    plain(tmp_path / "train" / "one.png")
    plain(tmp_path / "train" / "two.png")
    table = {"file_name": ["one.png", "two.png"], "text": ["a dog, brown", "a cat"]}
    if end == "csv":
        (tmp_path / "train" / "metadata.csv").write_text(
            'file_name,text\none.png,"a dog, brown"\ntwo.png,a cat\n'
        )
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(
            pytest.importorskip("pyarrow").table(table), tmp_path / "train" / "metadata.parquet"
        )
    found = load_pictures(str(tmp_path), "train", "not this", Reading())
    assert [one.instruction for one in found] == table["text"]


def test_the_digest_is_of_the_file_and_not_of_its_place(tmp_path: Path) -> None:
    first, second = plain(tmp_path / "x" / "a.png"), tmp_path / "y" / "b.png"
    second.parent.mkdir()
    second.write_bytes(first.read_bytes())
    plain(tmp_path / "y" / "c.png", colour=BLUE)
    one, two, three = load_pictures(str(tmp_path), "train", "c", Reading())
    assert one.output == two.output != three.output


def test_cmyk_transparency_sixteen_bits_and_a_turned_picture(tmp_path: Path) -> None:
    cmyk = open_picture(plain(tmp_path / "cmyk.jpg", colour=(0, 255, 255, 0), mode="CMYK"))
    assert cmyk.mode == "RGB" and corner(cmyk)[0] > 200 and corner(cmyk)[1] < 60
    clear = open_picture(plain(tmp_path / "clear.png", colour=(0, 0, 0, 0), mode="RGBA"))
    assert corner(clear) == (255, 255, 255)
    Image.fromarray(np.full((2, 2), 0x8040, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert corner(open_picture(tmp_path / "deep.png")) == (0x80, 0x80, 0x80)
    turned = Image.new("RGB", (4, 2), RED)
    turned.putpixel((0, 0), BLUE)
    tags = turned.getexif()
    tags[0x0112] = 6  # to be turned clockwise by 90 degrees
    turned.save(tmp_path / "turned.png", exif=tags)
    upright = open_picture(tmp_path / "turned.png")
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == BLUE


def test_sizes() -> None:
    wide = Image.new("RGB", (8, 4), RED)
    wide.paste(BLUE, (2, 0, 6, 4))  # the middle
    assert [sized(wide, Frame(4, how)).size for how in ("center", "stretch", "pad")] == [(4, 4)] * 3
    assert sized(wide, Frame(4)).getcolors() == [(16, BLUE)]
    assert corner(sized(wide, Frame(4, "pad"))) == (255, 255, 255)
    assert corner(sized(wide, Frame(4, "stretch")))[0] > 200


def test_buckets_of_aspects() -> None:
    """Of a square of 16 pixels in units of 4: 16 x 16, 20 x 12, and no 32 x 8, which is too long."""
    frame = Frame(16, "bucket", 4)
    sizes = [frame.size(*one) for one in ((7, 7), (100, 60), (60, 100), (900, 100), (100, 900), (110, 100))]
    assert sizes == [(16, 16), (20, 12), (12, 20), (20, 12), (12, 20), (16, 16)]
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 5000, (200, 2)).tolist():
        one, other = Frame(64, "bucket", 8).size(width, height)
        assert one % 8 == other % 8 == 0 and one * other <= 64**2 and max(one, other) <= 2 * min(one, other)
        assert Frame(64, "bucket", 8).size(height, width) == (other, one)
        assert Frame(64, "pad", 8).size(width, height) == (64, 64)
    wide = Image.new("RGB", (40, 24), RED)
    assert sized(wide, frame).size == (20, 12) and sized(wide, frame).getcolors() == [(240, RED)]


def animated(file: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(file, save_all=True, append_images=frames[1:])


def cut(file: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000])


BAD: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("a.gif", "is animated, with 2 frames", animated),
    ("a.png", "no picture that can be read", lambda file: file.write_bytes(b"no picture")),
    ("b.png", "no picture that can be read", lambda file: file.write_bytes(b"")),
    ("c.png", "no picture that can be read", cut),
    ("a.tif", "floating-point", lambda file: Image.new("F", (4, 4), 0.5).save(file)),
    ("d.png", "pixels", lambda file: Image.new("1", (9000, MOST_PIXELS // 9000 + 1)).save(file)),
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_pictures_are_pictures_or_refused(tmp_path: Path) -> None:
    """Whatever a decoder raises: of TIFF files with other bytes some had ended as a TypeError."""
    rng, refused = np.random.default_rng(0), 0
    whole = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    tags = whole.getexif()
    tags[0x0112] = 6
    for end in ("jpg", "png", "gif", "webp", "tif", "bmp"):
        file = tmp_path / f"x.{end}"
        whole.save(file, **({"exif": tags} if end in ("jpg", "png", "webp", "tif") else {}))
        good = file.read_bytes()
        for turn in range(60):
            bad = bytearray(good)
            for place in rng.integers(0, min(len(bad), 300), rng.integers(1, 6)):
                bad[place] = int(rng.integers(256))
            file.write_bytes(bad[: int(rng.integers(len(bad)))] if turn % 5 == 0 else bad)
            try:
                assert open_picture(file).mode == "RGB"
            except InputError as error:
                refused += 1
                assert str(file) in str(error) and "\n" not in str(error)
    assert refused > 60


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """Of 4 billion pixels in a few hundred bytes, which Pillow itself refuses, and of some text in a PNG."""
    Image.new("1", (8, 8)).save(tmp_path / "bomb.png")
    raw = bytearray((tmp_path / "bomb.png").read_bytes())
    raw[16:24] = (65_535).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(raw)
    with pytest.raises(InputError, match=r"bomb\.png: it has too many pixels"):
        open_picture(tmp_path / "bomb.png")
    about = PngImagePlugin.PngInfo()
    about.add_text("x", "0" * 3_000_000, zip=True)
    Image.new("1", (8, 8)).save(tmp_path / "text.png", pnginfo=about)
    with pytest.raises(InputError, match=r"text\.png: it is no picture that can be read: Decompressed data"):
        open_picture(tmp_path / "text.png")


@pytest.mark.parametrize("name,said,make", BAD, ids=[f"{name} {said}" for name, said, _ in BAD])
def test_bad_pictures_are_named_or_skipped(
    tmp_path: Path, name: str, said: str, make: Callable[[Path], Any]
) -> None:
    make(tmp_path / name)
    with pytest.raises(InputError, match=said) as error:
        load_pictures(str(tmp_path), "train", "c", Reading())
    assert name in str(error.value) and "\n" not in str(error.value)
    plain(tmp_path / "good.png")
    reading = Reading(skip=True)
    assert [Path(one.picture).name for one in load_pictures(str(tmp_path), "train", "c", reading)] == [
        "good.png"
    ]
    assert [place for place, _ in reading.skipped] == [name]


def test_what_a_folder_can_lack(tmp_path: Path) -> None:
    def refused(said: str, caption: str | None = None) -> None:
        with pytest.raises(InputError, match=said) as error:
            load_pictures(str(tmp_path), "train", caption, Reading())
        assert "\n" not in str(error.value)

    refused("holds no examples")
    plain(tmp_path / "a.png")
    plain(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("one")
    refused("1 of 2 pictures have no caption, the first is b.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "none.png", "text": "x"}))
    refused("its metadata name none.png, which is not there", "c")
    for outside in ("../b.png", str(tmp_path / "b.png")):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": outside, "text": "x"}))
        refused("metadata.jsonl:1: .*b.png is outside of the folder", "c")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png"}')
    refused("metadata.jsonl:1: it needs texts")
    (tmp_path / "metadata.jsonl").write_text("{")
    refused("metadata.jsonl:1")
    (tmp_path / "metadata.jsonl").write_text("[1]")
    refused("metadata.jsonl:1: it needs texts")
    with pytest.raises(InputError, match="is no folder"):
        load_pictures(str(tmp_path / "none"), "train", None, Reading())


def test_captions_of_figures() -> None:
    assert (
        Figure("red", "square", "blue", count=2, size="").caption() == "two red squares on a blue background"
    )
    striped = Figure("yellow", "cross", "orange", pattern="striped", second="purple")
    assert striped.caption() == "a striped yellow and purple cross on an orange background"
    assert Figure("orange", "star", "red", size="small").caption(background=False) == "a small orange star"


def test_captions_are_read_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        figure = any_figure(rng, wide=True, held_out=None)
        assert figure_of(figure.caption()) == figure
        other = like(figure, rng)
        changed = [name for name in vars(figure) if getattr(figure, name) != getattr(other, name)]
        assert 1 <= len(changed) <= 2 and set(changed) <= {"colour", "background", "shape", "count", "size"}
        assert figure_of(other.caption()) == other
    assert figure_of("a photo of sks dog") is None
    assert figure_of("an red square on a blue background") is None


def test_the_pixel_check_reads_what_is_drawn() -> None:
    rng, seen = np.random.default_rng(1), []
    for _ in range(150):
        figure = any_figure(rng)
        seen.append(all(right(picture(figure, rng), figure, SHAPES).values()))
    assert sum(seen) >= 145
    empty = np.zeros((3, 32, 32), np.float32) - 1
    found = read(empty)
    assert (found.background, found.count, found.shape, found.colours) == ("black", 0, "", ())


def test_the_pixel_check_finds_what_is_wrong() -> None:
    rng = np.random.default_rng(2)
    red = Figure("red", "square", "blue")
    pixels = picture(red, rng)
    assert all(right(pixels, red).values())
    for other, wrong in (
        (Figure("green", "square", "blue"), "colour"),
        (Figure("red", "circle", "blue"), "shape"),
        (Figure("red", "square", "white"), "background"),
        (Figure("red", "square", "blue", count=2), "count"),
    ):
        assert [name for name, fits in right(pixels, other).items() if not fits] == [wrong]


def test_the_bundled_pictures() -> None:
    train, test = subject_pictures("train"), subject_pictures("test")
    assert len(train) == 5 * len(SUBJECTS) and len(test) == 2 * len(SUBJECTS)
    again = subject_pictures("train")
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(train, again, strict=True))
    for subject in SUBJECTS:
        own = {colour for one, colour, _ in train if one == subject}
        kept = {colour for one, colour, _ in test if one == subject}
        assert (own, kept) == ({*backgrounds(subject)[:5]}, {backgrounds(subject)[6]})
        assert not own & kept and {*own, *kept} < {*COLOURS} - {subject.figure.colour}
    reading = Reading()
    examples = load_pictures("bundled", "train", None, reading)
    assert examples[0].instruction == f"a sks square on a {train[0][1]} background"
    assert [example.category for example in examples[::5]] == [subject.name for subject in SUBJECTS]
    assert np.asarray(as_image(train[0][2])).shape == (32, 32, 3)
