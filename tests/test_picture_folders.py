"""Folders of pictures as people have them: links, hidden files, ends of all kinds, captions twice, splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from fedtune.data.picture_folders import files_below, passed_over
from fedtune.data.pictures import load_pictures, open_picture, pictures_by_client
from fedtune.data.reading import Reading
from fedtune.errors import InputError


def plain(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 2), (255, 0, 0)).save(file)
    return file


def captions(folder: Path, everyone: str | None = None) -> dict[str, str]:
    """By the picture's place below the folder."""
    found = load_pictures(str(folder), "train", everyone, Reading())
    return {str(Path(one.picture).relative_to(folder)): one.instruction for one in found}


def refused(folder: Path, everyone: str | None = "c") -> str:
    with pytest.raises(InputError) as error:
        load_pictures(str(folder), "train", everyone, Reading())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_links_are_followed_once_and_hidden_files_are_not_there(tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    plain(site / "ünïcode näme.PNG")
    plain(site / "a b" / "c d" / "deep.JPEG")
    plain(elsewhere / "x.png")
    plain(site / ".hidden" / "y.png")
    plain(site / "._z.png")
    (site / "linked").symlink_to(elsewhere)
    (site / "one.png").symlink_to(elsewhere / "x.png")
    (site / "a b" / "round").symlink_to(site)  # leads back
    assert captions(site, "of {folder}") == {
        "a b/c d/deep.JPEG": "of c d",
        "linked/x.png": "of linked",
        "one.png": "of site",
        "ünïcode näme.PNG": "of site",
    }
    (site / "dead.png").symlink_to(tmp_path / "none.png")
    assert "dead.png: it is no picture that can be read" in refused(site)
    reading = Reading(skip=True)
    assert len(load_pictures(str(site), "train", "c", reading)) == 4
    assert [place for place, _ in reading.skipped] == ["dead.png"]


def test_a_client_may_be_a_link(tmp_path: Path) -> None:
    plain(tmp_path / "elsewhere" / "x.png")
    plain(tmp_path / "site" / "two" / "y.png")
    (tmp_path / "site" / "one").symlink_to(tmp_path / "elsewhere")
    found = pictures_by_client(str(tmp_path / "site"), "of {folder}", Reading())
    assert {name: [one.instruction for one in own] for name, own in found.items()} == {
        "one": ["of one"],
        "two": ["of two"],
    }


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    plain(tmp_path / "a.png")
    for name in ("a.txt", "b.heic", "c.HEIC", "d.avif", "notes.txt", "LICENSE"):
        (tmp_path / name).write_text("x")
    reading = Reading(what="data.train")
    load_pictures(str(tmp_path), "train", None, reading)
    assert reading.lines == [
        f"data.train: 1 pictures from {tmp_path}; no pictures that are read: "
        "1 .avif, 2 .heic, 1 .txt, 1 without an end"
    ]
    assert passed_over(files_below(tmp_path)[:1]) == "1 without an end"


def test_captions_from_a_text_editor_of_another_system(tmp_path: Path) -> None:
    plain(tmp_path / "IMG_1.PNG")
    (tmp_path / "IMG_1.TXT").write_bytes("\ufeffa dog\r\n".encode())
    assert captions(tmp_path, "not this") == {"IMG_1.PNG": "a dog"}
    (tmp_path / "IMG_1.TXT").write_bytes("ein Hündchen".encode("latin-1"))
    assert "IMG_1.TXT cannot be read: 'utf-8'" in refused(tmp_path)
    (tmp_path / "IMG_1.TXT").write_text(" \n")
    assert "1 of 1 pictures have no caption, the first is IMG_1.PNG" in refused(tmp_path)


def test_two_captions_for_one_picture(tmp_path: Path) -> None:
    plain(tmp_path / "a.png")
    line = '{"file_name": "a.png", "text": "a dog"}\n'
    (tmp_path / "metadata.jsonl").write_text(line * 2)
    assert captions(tmp_path) == {"a.png": "a dog"}
    (tmp_path / "metadata.jsonl").write_text(line + line.replace("dog", "cat"))
    said = refused(tmp_path)
    assert said.endswith('metadata.jsonl:2: a.png has another caption already, "a dog"; leave one out')
    (tmp_path / "metadata.jsonl").write_text(line)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cow\n")
    assert 'a.png has another caption already, "a cow"' in refused(tmp_path)


def test_metadata_that_name_a_file_of_another_kind(tmp_path: Path) -> None:
    plain(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"x")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.heic", "text": "a dog"}\n')
    assert "its metadata name b.heic, which is no picture by its end; read are .bmp, .gif," in refused(
        tmp_path
    )


@pytest.mark.parametrize("other", ["test", "validation"])
def test_the_hubs_parts_beside_each_other_are_not_trained_on_together(tmp_path: Path, other: str) -> None:
    plain(tmp_path / "train" / "dog" / "a.png")
    assert captions(tmp_path, "c") == {"train/dog/a.png": "c"}
    plain(tmp_path / other / "dog" / "b.png")
    said = refused(tmp_path)
    assert f"set data.train to {tmp_path / 'train'}, and data.holdout.source to {tmp_path / other}" in said
    plain(tmp_path / "cat" / "c.png")  # folders of subjects, one of which is called train
    assert len(captions(tmp_path, "c")) == 3


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_turned_grey_tiff(tmp_path: Path, turn: int, kind: Any, compression: str | None) -> None:
    """Pillow maps an uncompressed one by the size that it has once turned, and reads wrong rows."""
    grey = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    deep = grey.astype(np.uint16) * 257 if kind == "uint16" else grey
    tags = Image.Exif()
    tags[0x0112] = turn
    more = {"compression": compression} if compression else {}
    Image.fromarray(deep).save(tmp_path / "grey.tif", exif=tags, **more)
    turns = {1: 0, 3: 2, 6: -1, 8: 1}[turn]
    found = np.asarray(open_picture(tmp_path / "grey.tif"))
    assert np.array_equal(found, np.rot90(grey, turns)[..., None].repeat(3, -1))


def test_a_turned_cmyk_photograph(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 16), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 16, 16))  # blue on the left, so on top once turned clockwise
    tags = Image.Exif()
    tags[0x0112] = 6
    picture.convert("CMYK").save(tmp_path / "a.JPG", exif=tags, quality=95)
    found = open_picture(tmp_path / "a.JPG")
    assert found.size == (16, 32)
    assert np.abs(np.subtract(found.getpixel((8, 4)), (0, 0, 255))).max() < 8
    assert np.abs(np.subtract(found.getpixel((8, 28)), (255, 0, 0))).max() < 8


def test_a_phones_photograph_with_another_behind_it(tmp_path: Path) -> None:
    """An MPO is no animation: what is behind the first is a preview, or depths."""
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((0, 128, 0), (255, 0, 0)))
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    found = open_picture(tmp_path / "phone.jpg")
    assert np.abs(np.subtract(found.getpixel((8, 8)), (0, 128, 0))).max() < 8
    first.save(tmp_path / "moving.webp", save_all=True, append_images=[second])
    first.save(tmp_path / "moving.png", save_all=True, append_images=[second])
    for name in ("moving.webp", "moving.png"):
        with pytest.raises(InputError, match=f"{name}: it is animated, with 2 frames"):
            open_picture(tmp_path / name)


def test_sixteen_bits_a_colour(tmp_path: Path) -> None:
    """Written by hand, since Pillow writes none: one pixel of 0x80ff, 0x0100, 0xffff."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">HHH", 0x80FF, 0x0100, 0xFFFF)
    whole = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + whole)
    assert open_picture(tmp_path / "deep.png").getpixel((0, 0)) == (0x80, 0x01, 0xFF)
    palette = whole.replace(head, head[:9] + b"\x03" + head[10:])  # 16 bits of a palette: no PNG has that
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + palette)
    with pytest.raises(InputError, match=r"bad\.png: it is no picture that can be read"):
        open_picture(tmp_path / "bad.png")
