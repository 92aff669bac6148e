"""An image of a prompt: read from what a data set gives, checked before anything is allocated, kept as a small PNG.

An image is what a file viewer shows: turned as its EXIF data say, on white where it is transparent, in RGB, and no
larger than `max_pixels`. What cannot be such an image is refused with its place in the data. How many tokens it takes
and where they stand is the model's (`grpo/model/image_tokens.py`). Imports neither torch nor, before it is used, PIL.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import math
import stat
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.errors import UserError

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 1280 * 28 * 28
"""Of an image, where nothing else is set: 1,280 tokens of Qwen2.5-VL, the upper end that its authors recommend."""
MOST_PIXELS = 89_478_485
"""Of the file that an image is read from, before it is scaled: a quarter of a gigabyte in RGB, and where PIL warns."""
MOST_BYTES = 1 << 26
"""Of such a file."""
STEEPEST = 200
"""The longer side over the shorter one, from which on Qwen's processors refuse an image."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Those that are read. PIL knows others, of which some start further programs."""
PREVIEW = 384
"""Pixels of the longer side of what a run keeps of an image."""
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF's orientation -> the name in `PIL.Image.Transpose` of what undoes it."""
ORIENTATION = 0x0112
FAST = 1
"""zlib's level: an image is packed once and unpacked at least once a step."""


@dataclass(frozen=True)
class Image:
    """An RGB image. Two of the same pixels are equal, whatever they were read from."""

    data: bytes = field(repr=False, compare=False)
    """The image as a PNG."""
    width: int = field(compare=False)
    height: int = field(compare=False)
    digest: str
    """SHA-256 of size and RGB bytes, in hexadecimal digits."""

    @classmethod
    def of(cls, picture: PIL.Image.Image) -> Image:
        """`picture`, of mode RGB, as it is."""
        width, height = picture.size
        digest = hashlib.sha256(f"{width}x{height} ".encode() + picture.tobytes()).hexdigest()
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=FAST)
        return cls(file.getvalue(), width, height, digest)

    def pil(self) -> PIL.Image.Image:
        """A PIL image of mode RGB, a new one with each call."""
        from PIL import Image as pil

        return pil.open(io.BytesIO(self.data), formats=["PNG"]).convert("RGB")

    def preview(self) -> bytes:
        """A small WebP to look at, of at most `PREVIEW` pixels a side and some kilobytes."""
        file, share = io.BytesIO(), PREVIEW / max(self.width, self.height)
        (self.pil() if share >= 1 else resized(self.pil(), share)).save(file, "WEBP", quality=80, method=2)
        return file.getvalue()

    def within(self, longest: int) -> Image:
        """The image, scaled down where a side is longer than `longest` pixels."""
        share = longest / max(self.width, self.height)
        return self if share >= 1 else Image.of(resized(self.pil(), share))


def preview_name(digest: str) -> str:
    """The file in a run's `completions/images/` that shows the image of that digest."""
    return f"{digest[:32]}.webp"


ReadImage = Callable[[Any, str], Image]
"""Reads what a row has for an image; the text is what errors call it."""


class Unusable(Exception):
    """Why an image cannot be used, with the remedy."""


def read_image(
    value: Any, where: str, *, max_pixels: int = MAX_PIXELS, folder: Path | None = None, urls: bool = False
) -> Image:
    """`value`, as data sets have images, as an Image of at most `max_pixels` pixels.

    `value` is a PIL image, the bytes of a file, a dict of "bytes" or "path" as `datasets` gives it, a path, a data URI
    with base64, or an Image; with `urls`, also a URL, whose file is downloaded. Relative paths start in `folder`, by
    default the current one. Raises UserError, which begins with `where`, for whatever else it is, and for a file that
    is no image, damaged, animated or too large: the sizes are known before an image is unpacked.
    """
    try:
        if isinstance(value, Image):
            fits = value.width * value.height <= max_pixels
            return value if fits else Image.of(limited(value.pil(), max_pixels))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's are about sizes, which are checked here, and odd entries of EXIF
            picture = opened(fetched(value) if urls else value, folder or Path())
            check_size(picture)
            return Image.of(limited(unpacked(picture), max_pixels))
    except Unusable as error:
        raise UserError(f"{where}: its image {named(value)}{error}") from None


def named(value: Any) -> str:
    """The file that `value` is read from, for an error; nothing where there is none."""
    path = value.get("path") if isinstance(value, Mapping) else value
    return f"{str(path)[:200]} " if isinstance(path, str | Path) and not str(path).startswith("data:") else ""


def reason(error: Exception) -> str:
    return str(error).split("\n")[0][:200] or type(error).__name__


def fetched(value: Any) -> Any:
    """The bytes at the URL that `value` is; what is none, as it is. Raises Unusable."""
    url = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value
    if not isinstance(url, str) or not is_url(url):
        return value
    from grpo.image_urls import Unfetchable, fetch

    try:
        return fetch(url, MOST_BYTES)
    except Unfetchable as error:
        raise Unusable(str(error)) from None


def is_url(path: str) -> bool:
    return "://" in path[:40] and not path.startswith("data:")


# Opening: of the file, only its header is read


def opened(value: Any, folder: Path) -> PIL.Image.Image:
    """A PIL image that is not unpacked yet. Raises Unusable."""
    from PIL import Image as pil

    if isinstance(value, pil.Image):
        return value
    if isinstance(value, Mapping) and not {"bytes", "path"} & value.keys():
        raise Unusable('is a dict without "bytes" or "path"; give it one')
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str | Path):
        value = of_uri(value) if str(value).startswith("data:") else of_file(value, folder)
    if not isinstance(value, bytes | bytearray | memoryview):
        raise Unusable(f"is of the type {type(value).__name__}; give a PIL image, a file's bytes, or a path")
    if len(value) > MOST_BYTES:
        raise Unusable(f"has {len(value):,} bytes, more than {MOST_BYTES:,}; scale it down")
    if not value:
        raise Unusable("is empty; replace it, or leave the row out")
    try:
        return pil.open(io.BytesIO(value), formats=FORMATS)
    except pil.DecompressionBombError:
        raise Unusable(f"has more than {MOST_PIXELS:,} pixels; scale it down") from None
    except Exception as error:
        known = ", ".join(FORMATS)
        why = "" if isinstance(error, pil.UnidentifiedImageError) else f" ({reason(error)})"
        raise Unusable(f"cannot be read{why}; it must be a whole file of the kinds {known}") from None


def of_file(path: str | Path, folder: Path) -> bytes:
    """The bytes of the file at `path`. Raises Unusable for a URL and for what is no file of a usual size."""
    if is_url(str(path)):
        raise Unusable(
            "is a URL, and nothing is downloaded while data are read; download it, and give its path, or set "
            "model.image_urls = true"
        )
    file = folder / Path(path).expanduser()
    try:
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise Unusable("is no file; give the path of one")
        if facts.st_size > MOST_BYTES:
            raise Unusable(f"has {facts.st_size:,} bytes, more than {MOST_BYTES:,}; scale it down")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Unusable(f"cannot be read ({why}); relative paths start in {folder.resolve()}") from None


def of_uri(uri: str | Path) -> bytes:
    """The bytes in a data URI. Raises Unusable."""
    head, comma, content = str(uri).partition(",")
    with contextlib.suppress(binascii.Error, ValueError):
        if comma and head.endswith(";base64"):
            return base64.b64decode(content, validate=True)
    raise Unusable('is a data URI that is not "data:image/...;base64,..."; correct it')


def check_size(picture: PIL.Image.Image) -> None:
    """Raise Unusable for what is animated, empty, or larger than is unpacked."""
    width, height = picture.size
    if min(width, height) < 1:
        raise Unusable(f"is {width} x {height} pixels, which is nothing; leave the row out")
    if width * height > MOST_PIXELS:
        raise Unusable(f"is {width} x {height} pixels, more than {MOST_PIXELS:,}; scale it down")
    if max(width, height) > STEEPEST * min(width, height):
        raise Unusable(f"is {width} x {height} pixels, a strip that models cannot take; cut it into pieces")
    try:
        several = bool(getattr(picture, "is_animated", False))
    except Exception as error:  # a decoder looks for the next frame, and its errors are of every kind
        raise damaged(error) from None
    # A telephone's MPO is a JPEG with a preview behind it.
    if several and picture.format != "MPO":
        raise Unusable("has several frames; choose one and save it alone")


def damaged(error: Exception) -> Unusable:
    return Unusable(f"is damaged or cut short ({reason(error)}); replace it, or leave the row out")


# What a viewer shows


def unpacked(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The image upright and in RGB. Raises Unusable."""
    try:
        return upright(in_rgb(picture), orientation(picture))
    except Unusable:
        raise
    except Exception as error:  # a decoder's errors are of every kind
        raise damaged(error) from None


def orientation(picture: PIL.Image.Image) -> int:
    """How the camera was held, by EXIF; 1 is upright."""
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:
        raise Unusable("has EXIF data that cannot be read; save it without them") from None


def upright(picture: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    from PIL import Image as pil

    turn = TURNS.get(orientation)
    return picture if turn is None else picture.transpose(pil.Transpose[turn])


def in_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The image unpacked, in RGB, on white. Raises Unusable for numbers without a range."""
    from PIL import Image as pil

    if picture.mode in ("I", "F"):
        raise Unusable("has 32-bit pixels, whose range nobody knows; save it with 8 bits")
    if picture.mode.startswith("I;16"):
        picture = picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if picture.has_transparency_data:
        front = picture.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", front.size, "white"), front).convert("RGB")
    return picture.convert("RGB")


def limited(picture: PIL.Image.Image, max_pixels: int) -> PIL.Image.Image:
    """The image, scaled down to at most `max_pixels` pixels."""
    width, height = picture.size
    return picture if width * height <= max_pixels else resized(picture, math.sqrt(max_pixels / (width * height)))


def resized(picture: PIL.Image.Image, share: float) -> PIL.Image.Image:
    """The image with both sides multiplied by `share`, rounded down, but for a side of at least one pixel."""
    from PIL import Image as pil

    width, height = (max(1, math.floor(side * share)) for side in picture.size)
    return picture.resize((width, height), pil.Resampling.BICUBIC)
