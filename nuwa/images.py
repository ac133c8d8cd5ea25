"""The one reading of images: encoded bytes → what a person sees, as RGB with eight bits a sample.

Every stage and the library call read images here, so that sizes, boxes and pixels are of the same picture:

* **Orientation.** The EXIF orientation tag is applied; width, height and boxes are those of the turned picture.
* **Frames.** Of an animation or a file of several pages the first is read.
* **Bit depth.** Of 16-bit samples the high byte counts, as Pillow reads 16-bit colour. Float samples are shares of white
  and must lie in [0, 1]. Where a file says that zero is white, it is. 32-bit and signed integers have no agreed white and
  are refused.
* **Colour.** An embedded profile other than sRGB is converted to sRGB (LittleCMS, perceptual); one that is damaged or of
  another colour space is passed over, as browsers do. What is transparent is shown on white; one transparent colour among
  16-bit ones is refused, since Pillow keeps only half of each sample to compare with it.
* **Limits.** Formats are those of ``FORMATS``; more than ``MAX_PIXELS`` are refused from the header, before anything is
  decoded. A picture that is cut off is refused.

``READING`` names these rules. It belongs to the identity of whatever is computed from pixels: change it with them.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from nuwa.errors import UserError, in_one_line

READING = "upright, first frame, 8-bit sRGB on white: 2"
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO"),
    *("PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)
MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; Pillow's own limit
TOO_LARGE = f"an image of more than {MAX_PIXELS:,} pixels is not read; make it smaller"
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
PNG_TAGS = (b"eXIf", b"exif", b"XML:com.adobe.xmp")  # chunks that may hold an orientation
SAMPLE_FORMAT, SIGNED = 339, 2  # a tag of TIFF, and what it says of integers below zero
TURNED = (5, 6, 7, 8)  # orientations that exchange width and height


class ImageError(UserError, ValueError):
    """Bytes or a file that cannot be read as a picture; ``fault`` is the reason without what was read."""

    def __init__(self, message: str, fault: str | None = None) -> None:
        super().__init__(message)
        self.fault = fault or message


def read_image(source: bytes | Path) -> Image.Image:
    """The picture as RGB, eight bits a sample; ``source``: encoded bytes, or a file.

    Raises:
        ImageError: no picture of ``FORMATS``, too large, cut off, or with samples of no agreed white.
    """
    with _quiet():
        try:
            with _opened(_content(source)) as image:
                _check_samples(image)
                image.load()
                return upright_rgb(image)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # each of Pillow's decoders has errors of its own
            fault = _fault(error)
            raise ImageError(f"{_named(source)} cannot be decoded ({fault})", fault) from None


def image_size(source: bytes | Path) -> tuple[int, int]:
    """Width and height of :func:`read_image`'s picture in pixels, from the header alone.

    Raises:
        ImageError: the header is of no picture of ``FORMATS``, or of one that is too large.
    """
    with _quiet():
        try:
            content = _content(source)
            with _opened(content) as image:
                if isinstance(
                    image, TiffImagePlugin.TiffImageFile
                ):  # Pillow's releases differ in whether its size is turned already
                    width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
                    turn = image.tag_v2.get(ExifTags.Base.Orientation, 1)
                else:
                    # Pillow decodes the whole of a PNG to look for a tag behind its pixels.
                    tagged = image.format != "PNG" or any(mark in content for mark in PNG_TAGS)
                    (width, height), turn = image.size, _orientation(image) if tagged else 1
                return (height, width) if turn in TURNED else (width, height)
        except (ImageError, MemoryError):
            raise
        except Exception as error:
            raise ImageError(f"{_named(source)} cannot be opened ({type(error).__name__})", _fault(error)) from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as :func:`read_image` gives it, at the frame where it stands; RGB that is upright comes back as it is.

    The result carries no orientation tag, so reading it again changes nothing.

    Raises:
        ImageError: samples of no agreed white, or float samples outside [0, 1].
    """
    _check_samples(image)
    from_white = _zero_is_white(image)
    if image.format == "TIFF":
        image.load()  # turns it and takes the tag away
    if image.mode == "La":  # Pillow makes no RGB of it
        image = image.convert("LA")
    turn = _orientation(image) > 1
    profile = image.info.get("icc_profile")
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if image.mode == "RGB" and not (turn or profile or transparent):
        return image

    if turn:
        image = ImageOps.exif_transpose(image)
    image = _eight_bits(image)
    if from_white:
        image = ImageOps.invert(image)
    if transparent:
        image = _on_white(image)
    return _standard_colours(image, profile)


def _opened(content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=_formats())
    except Image.DecompressionBombError:  # the same limit, unless someone has moved Pillow's
        raise ImageError(TOO_LARGE) from None
    if math.prod(image.size) > MAX_PIXELS:
        raise ImageError(TOO_LARGE)
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    """``FORMATS`` that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _quiet() -> warnings.catch_warnings:
    """Pillow's warnings about large or odd files: what matters of them is refused here."""
    return warnings.catch_warnings(action="ignore", category=Warning)


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where there is no tag or a damaged one. Pillow itself turns TIFF when it opens or decodes it."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata beside a whole picture
        return 1
    return value if value in range(1, 9) else 1


def _check_samples(image: Image.Image) -> None:
    """Refuse what Pillow would decode into something else; what it is told of the file is gone once it is decoded."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and SIGNED in image.tag_v2.get(SAMPLE_FORMAT, ()):
        raise ImageError("signed integer samples have no agreed white; save the image with 8 or 16 bits")
    colour = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(colour, tuple):
        wide = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        if wide or max(colour) > 255:
            raise ImageError("a transparent colour among 16-bit ones is not read; save the image with an alpha channel")


def _zero_is_white(image: Image.Image) -> bool:
    """Whether wide grey samples count from white, as a TIFF may say; narrow ones Pillow itself turns round."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or image.mode not in (*SIXTEEN_BITS, "I", "F"):
        return False
    return image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0


def _eight_bits(image: Image.Image) -> Image.Image:
    """Wider samples as grey with eight bits, and alpha where one of them is transparent; any other image as it is."""
    if image.mode in (*SIXTEEN_BITS, "I"):
        samples = np.asarray(image)
        samples = _sixteen_bits(samples, image.format) if image.mode == "I" else samples.astype(np.uint16)
        grey = Image.fromarray((samples >> 8).astype(np.uint8))
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey.putalpha(Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8)))
        return grey
    if image.mode == "F":
        shares = np.asarray(image, np.float64)
        if not (np.isfinite(shares).all() and shares.min() >= 0 and shares.max() <= 1):
            raise ImageError(
                f"float samples from {shares.min():g} to {shares.max():g}: only shares of white in [0, 1] are read; "
                "save the image with 8 or 16 bits"
            )
        return Image.fromarray(np.floor(shares * 255 + 0.5).astype(np.uint8))
    return image


def _sixteen_bits(samples: np.ndarray, file_format: str | None) -> np.ndarray:
    """Pillow hands over some 16-bit files in 32 bits: PNG and PGM, whose white is 65535 by definition."""
    if file_format not in ("PNG", "PPM") or samples.min() < 0 or samples.max() > 0xFFFF:
        raise ImageError("32-bit integer samples have no agreed white; save the image with 8 or 16 bits")
    return samples


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema() == (255, 255):  # opaque: nothing to mix, and no rounding
        return layer.convert("RGB")
    canvas = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(canvas, layer).convert("RGB")


def _standard_colours(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB, without profile or orientation."""
    if profile:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(own).lower():
                source = image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB")
                image = ImageCms.profileToProfile(source, own, _srgb(), outputMode="RGB") or image  # null only in place
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    for name in ("icc_profile", "exif", "transparency"):
        image.info.pop(name, None)
    return image


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _content(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{source}: no such image file") from None


def _named(source: bytes | Path) -> str:
    return f"its {len(source)} image bytes" if isinstance(source, bytes) else f"{source}: the image"


def _fault(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "UnidentifiedImageError: cannot identify image"  # Pillow names the buffer's address
    words = in_one_line(error)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
