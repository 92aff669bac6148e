"""An image is what a viewer shows, whatever form it comes in; what is none is a sentence, before memory is taken."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pil

from grpo.errors import UserError
from grpo.images import FORMATS, MAX_PIXELS, MOST_BYTES, MOST_PIXELS, Image, read_image
from tests.helpers.pictures import file_of, noise

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def refusal(value: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_image(value, "data.jsonl:7", **options)
    said = str(caught.value)
    assert said.startswith("data.jsonl:7: its image ") and "\n" not in said
    return said.removeprefix("data.jsonl:7: its image ")


def same(image: Image, expected: pil.Image) -> bool:
    return image.pil().tobytes() == expected.tobytes() and (image.width, image.height) == expected.size


# Forms


def test_every_form_of_an_image_gives_the_same(tmp_path: Path) -> None:
    original = noise(3, 2)
    data = file_of(original)
    (tmp_path / "a.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = [original, data, bytearray(data), memoryview(data), {"bytes": data, "path": None}, {"bytes": data}, uri]
    forms += [{"path": str(tmp_path / "a.png"), "bytes": None}, tmp_path / "a.png", str(tmp_path / "a.png")]
    images = [read_image(form, "row 1") for form in forms] + [read_image("a.png", "row 1", folder=tmp_path)]
    assert len(set(images)) == 1 and all(same(image, original) for image in images)
    assert read_image(images[0], "row 1") is images[0]
    assert pickle.loads(pickle.dumps(images[0])) == images[0]


def test_equal_pixels_are_equal_and_others_are_not() -> None:
    first = read_image(noise(), "row 1")
    assert first == read_image(file_of(noise(), "BMP"), "row 2")
    assert first != read_image(noise(seed=1), "row 3")
    one_row, one_column = (read_image(pil.new("RGB", size, "red"), "row 4") for size in ((6, 1), (1, 6)))
    assert one_row != one_column


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(kind: str) -> None:
    image = read_image(file_of(pil.new("RGB", (40, 30), RED), kind), "row 1")
    assert (image.width, image.height) == (40, 30)
    assert all(abs(a - b) < 6 for a, b in zip(image.pil().getpixel((20, 15)), RED, strict=True))  # type: ignore[arg-type]


# What a viewer shows


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_undone(turn: int) -> None:
    shown = noise(5, 3)
    undo = [None, 0, 3, 1, 5, 2, 6, 4]  # what a camera does to it, as PIL numbers transpositions
    stored = shown if turn == 1 else shown.transpose(undo[turn - 1])  # type: ignore[arg-type]
    exif = pil.Exif()
    exif[0x0112] = turn
    assert same(read_image(file_of(stored, exif=exif), "row 1"), shown)


def test_transparency_is_on_white() -> None:
    half = pil.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    for image in (half, half.convert("LA"), half.convert("RGBa")):
        assert read_image(image, "row 1").pil().getpixel((1, 0)) == WHITE
    palette = pil.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    shown = read_image(file_of(palette, transparency=1), "row 1").pil()
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]


def test_sixteen_bits_keep_their_range() -> None:
    values = numpy.array([[0, 128 << 8, 65535]], dtype=numpy.uint16)
    shown = read_image(file_of(pil.fromarray(values)), "row 1").pil()
    assert [shown.getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in (0, 128, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_become_rgb(mode: str) -> None:
    image = read_image(pil.new("RGB", (4, 4), "white").convert(mode), "row 1")
    assert all(value >= 253 for value in image.pil().getpixel((1, 1)))  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 20_000))
def test_no_image_is_larger_than_asked_for(width: int, height: int, most: int) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    image = read_image(pil.new("RGB", (width, height)), "row 1", max_pixels=most)
    strip = min(image.width, image.height) == 1
    assert image.width * image.height <= most or strip
    if width * height <= most:
        assert (image.width, image.height) == (width, height)
    elif min(image.width, image.height) >= 20:
        assert abs(image.width / image.height - width / height) < 0.12 * width / height
    smaller = image.within(50)
    assert max(smaller.width, smaller.height) <= 50 and (smaller is image) == (max(image.width, image.height) <= 50)
    assert read_image(image, "row 1", max_pixels=most) == image or strip


# What is none


def test_what_is_no_image_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    assert "a.png cannot be read (No such file or directory); relative paths start in" in refusal("a.png")
    assert "text.png cannot be read; it must be a whole file of the kinds PNG" in refusal(tmp_path / "text.png")
    assert refusal(tmp_path).endswith("is no file; give the path of one")
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in refusal(tmp_path / "pipe") and "is no file" in refusal("/dev/zero")
    assert refusal("http://example.org/a.png").startswith("http://example.org/a.png is a URL, and nothing is")
    assert "is a URL" in refusal("s3://bucket/a.png") and "is a URL" in refusal("file:///etc/passwd")
    assert "cannot be read" in refusal("a\0b") and "cannot be read" in refusal("x" * 5000)
    for uri in ("data:image/png;base64,@@@", "data:image/png,abc", "data:", "data:image/png;base64"):
        assert "is a data URI that is not" in refusal(uri)
    assert refusal(b"") == "is empty; replace it, or leave the row out"
    assert refusal({}).startswith('is a dict without "bytes" or "path"')
    for value in (None, 3, [1], {"bytes": None, "path": None}, numpy.zeros((2, 2, 3))):
        assert "is of the type" in refusal(value)
    assert "cannot be read" in refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_a_damaged_image_is_a_sentence() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        data = file_of(noise(64, 64), kind)
        said = refusal(data[: len(data) // 2])
        assert "is damaged or cut short" in said or "cannot be read" in said
    flipped = bytearray(file_of(noise(64, 64)))
    flipped[len(flipped) // 2] ^= 255
    assert "is damaged or cut short" in refusal(bytes(flipped))


def test_frames_that_end_at_any_byte_are_a_sentence() -> None:
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        whole = file_of(noise(12, 9), kind, save_all=True, append_images=[noise(12, 9, seed=1)])
        assert "several frames" in refusal(whole)
        for end in range(len(whole)):
            with contextlib.suppress(UserError):
                read_image(whole[:end], "row 1")


def test_animated_and_empty_and_narrow_images_are_sentences() -> None:
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        frames = [noise(9, 9, seed=seed) for seed in range(3)]
        said = refusal(file_of(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert said == "has several frames; choose one and save it alone"
    assert "is 0 x 5 pixels, which is nothing" in refusal(pil.new("RGB", (0, 5)))
    assert "is 1 x 201 pixels, a strip" in refusal(pil.new("RGB", (1, 201)))
    assert read_image(pil.new("RGB", (1, 200)), "row 1").height == 200
    for mode in ("I", "F"):
        assert "has 32-bit pixels" in refusal(pil.new(mode, (4, 4)))


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG that says it has these sizes, with these packed rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("sides", [(9460, 9460), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)])
def test_a_bomb_is_refused_before_it_is_unpacked(sides: tuple[int, int]) -> None:
    bomb = png(*sides, b"\0" * 100_000)
    tracemalloc.start()
    said = refusal(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "pixels" in said and peak < 2_000_000
    assert MOST_PIXELS < 9460**2


def test_a_large_file_is_not_even_read(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    tracemalloc.start()
    assert "bytes, more than" in refusal(tmp_path / "large.png")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert "bytes, more than" in refusal(bytes(MOST_BYTES + 1))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_bytes_end_otherwise_than_in_an_image_or_a_sentence(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(FORMATS))
    exif = pil.Exif()
    exif[0x0112] = 6
    options: dict[str, Any] = {} if kind == "BMP" else {"exif": exif}
    if kind in ("GIF", "TIFF", "WEBP", "PNG") and data.draw(st.booleans()):
        options |= {"save_all": True, "append_images": [noise(12, 9, seed=1)]}
    content = bytearray(file_of(noise(12, 9), kind, **options))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        image = read_image(bytes(content), "row 1")
    except UserError as error:
        assert str(error).startswith("row 1: its image ") and "\n" not in str(error)
    else:
        assert image.width * image.height <= MAX_PIXELS and image.pil().size == (image.width, image.height)


def test_neither_torch_nor_pil_is_imported_before_an_image_is_read() -> None:
    code = "import sys, grpo.images; print(*(name for name in ('torch', 'PIL', 'numpy') if name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
