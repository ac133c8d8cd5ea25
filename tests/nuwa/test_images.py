"""The one reading of images: real files of many kinds against what their formats say a person sees."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

import nuwa
from nuwa.benchmarks import get_benchmark
from nuwa.benchmarks.records import RecordError
from nuwa.images import MAX_PIXELS, ImageError, image_size, read_image, upright_rgb

# EXIF 2.32, tag 274: what stored rows and columns are of the picture, as moves of the stored array.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}
PICTURE = np.random.default_rng(4).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def oriented(orientation: int, file_format: str, **options) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return encoded(Image.fromarray(PICTURE), file_format, exif=tags, **options)


def seen(content: bytes) -> np.ndarray:
    image = read_image(content)
    assert image.mode == "RGB" and image.size == image_size(content)
    return np.asarray(image)


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_a_photo_is_turned_as_its_tag_says(orientation, file_format, options):
    content = oriented(orientation, file_format, **options)
    assert (seen(content) == UPRIGHT[orientation](PICTURE)).all()


def test_a_photo_of_a_phone_and_a_box_as_people_see_it():
    """JPEG, turned by a quarter: size and truth are of the upright picture; so is what the model gets."""
    content = oriented(6, "JPEG", quality=95)
    assert image_size(content) == (20, 30)
    row = {
        "question_id": "1",
        "image": {"bytes": content, "path": None},
        "question": "?",
        "answer": ["dog"],
        "segmentation": [],
        "bbox": [5.0, 15.0, 10.0, 15.0],
        "iscrowd": 0,
        "file_name": "a.jpg",
    }
    (example,) = get_benchmark("refcoco").read(row)
    assert example.truth["box"] == [0.25, 0.5, 0.75, 1.0]
    stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert (seen(content) == np.rot90(stored, -1)).all()


def test_reading_again_changes_nothing_and_the_library_reads_alike():
    image = Image.open(io.BytesIO(oriented(8, "PNG")))
    once = upright_rgb(image)
    assert (np.asarray(upright_rgb(once)) == np.asarray(once)).all() and once.size == (20, 30)
    converted = Image.open(io.BytesIO(oriented(8, "PNG"))).convert("RGB")  # the tag stays with it
    assert (np.asarray(upright_rgb(converted)) == np.asarray(once)).all()
    plain = Image.fromarray(PICTURE)
    assert upright_rgb(plain) is plain


def test_the_library_answers_about_the_upright_photo(tiny_vlm):
    content = oriented(6, "PNG")
    upright = Image.fromarray(np.ascontiguousarray(np.rot90(PICTURE, -1)))
    one, other = (
        nuwa.generate(tiny_vlm.model, tiny_vlm.processor, [image], ["what is on the left ?"], average_tokens=20)[0]
        for image in (Image.open(io.BytesIO(content)), upright)
    )
    assert one.tokens == other.tokens and one.kept == other.kept


def test_a_tag_of_no_meaning_or_damaged_metadata_turns_nothing():
    assert (seen(oriented(9, "PNG")) == PICTURE).all()
    damaged = encoded(Image.fromarray(PICTURE), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert (seen(damaged) == PICTURE).all()


# --- samples wider than eight bits


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled_and_not_cut_to_white(file_format):
    samples = np.random.default_rng(1).integers(0, 65536, (6, 7), dtype=np.uint16)
    grey = seen(encoded(Image.fromarray(samples), file_format))
    assert (grey == (samples // 256)[..., None]).all() and grey.min() < 50 < 200 < grey.max()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(bits: int, colour: int, rows: np.ndarray, further: bytes = b"") -> bytes:
    """A PNG by its specification, of ``rows`` of big-endian bytes; ``further``: chunks before the pixels."""

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    height, width = len(rows), rows.shape[1] * 8 // (bits * channels)
    filtered = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + further + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(samples: np.ndarray, *, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A TIFF of one grey channel by its specification; ``photometric`` 0: zero is white; ``sample_format`` 2: signed."""
    (height, width), content = samples.shape, samples.tobytes()
    tags = {256: width, 257: height, 258: samples.itemsize * 8, 259: 1, 262: photometric, 277: 1, 278: height}
    tags |= {279: len(content), 339: sample_format}
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if value > 0xFFFF else 3, 1, value) for tag, value in sorted(tags.items())
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + content


def test_grey_and_colour_of_one_picture_in_sixteen_bits_are_the_same_pixels():
    samples = np.random.default_rng(2).integers(0, 65536, (5, 4, 1), dtype=np.uint16)
    grey, colour = (
        png(16, kind, np.broadcast_to(samples, (5, 4, channels)).astype(">u2").reshape(5, -1).view(np.uint8))
        for kind, channels in ((0, 1), (2, 3))
    )
    assert (seen(grey) == seen(colour)).all()


def test_where_zero_is_white_wide_grey_is_turned_round_as_narrow_is():
    samples = np.random.default_rng(3).integers(0, 65536, (6, 7), dtype=np.uint16)
    narrow = (samples >> 8).astype(np.uint8)
    for photometric, expected in ((1, narrow), (0, 255 - narrow)):
        assert (seen(tiff(samples, photometric=photometric)) == expected[..., None]).all()
        assert (seen(tiff(narrow, photometric=photometric)) == expected[..., None]).all()
    shares = np.linspace(0, 1, 42, dtype=np.float32).reshape(6, 7)
    plain, turned = (seen(tiff(shares, photometric=which, sample_format=3)).astype(int) for which in (1, 0))
    assert (plain + turned == 255).all() and plain.max() == 255


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32])
def test_signed_samples_are_refused(kind):
    with pytest.raises(ImageError) as caught:
        read_image(tiff(np.full((2, 3), -1, kind), sample_format=2))
    assert str(caught.value) == "signed integer samples have no agreed white; save the image with 8 or 16 bits"
    with pytest.raises(
        ImageError, match=r"^32-bit integer samples have no agreed white; save the image with 8 or 16 bit"
    ):
        read_image(tiff(np.full((2, 3), 7, np.uint32)))


def test_a_transparent_shade_of_sixteen_bits_is_that_shade_alone():
    samples = np.array([[0x1234, 0x1235, 0x12FF]], np.uint16)
    content = png(16, 0, samples.astype(">u2").view(np.uint8), chunk(b"tRNS", b"\x12\x34"))
    assert seen(content)[0, :, 0].tolist() == [255, 0x12, 0x12]


@pytest.mark.parametrize("colour", [(0x1234, 0, 0), (0, 0, 0)])
def test_a_transparent_colour_of_sixteen_bits_is_refused(colour):
    """Pillow holds the high byte of each sample, so it would clear pixels that only begin alike, or none."""
    samples = np.array([[[0x1234, 0, 0], [0x12FF, 0, 0], [1, 2, 3]]], np.uint16)
    content = png(
        16, 2, samples.astype(">u2").reshape(1, -1).view(np.uint8), chunk(b"tRNS", struct.pack(">3H", *colour))
    )
    with pytest.raises(ImageError) as caught:
        read_image(content)
    assert str(caught.value) == (
        "a transparent colour among 16-bit ones is not read; save the image with an alpha channel"
    )
    opened = Image.open(io.BytesIO(content))
    with pytest.raises(ImageError, match="a transparent colour among 16-bit ones"):
        upright_rgb(opened)


@pytest.mark.parametrize("mode", ["La", "LA", "RGBa", "PA", "I;16", "F", "CMYK", "YCbCr", "LAB", "HSV", "1"])
def test_the_library_takes_images_of_every_mode(mode):
    assert upright_rgb(Image.new(mode, (4, 3))).mode == "RGB"


def test_floats_are_shares_of_white():
    shares = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    assert (seen(encoded(Image.fromarray(shares), "TIFF"))[..., 0] == np.rint(shares.astype(float) * 255)).all()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.full((2, 2), 3.5, np.float32), "float samples from 3.5 to 3.5: only shares of white in [0, 1] are read; "),
        (np.full((2, 2), np.nan, np.float32), "float samples from nan to nan: only shares of white in [0, 1] are read"),
        (
            np.full((2, 2), -1, np.int32),
            "signed integer samples have no agreed white; save the image with 8 or 16 bits",
        ),
    ],
)
def test_samples_of_no_agreed_white_are_refused(samples, message):
    with pytest.raises(ImageError) as caught:
        read_image(encoded(Image.fromarray(samples), "TIFF"))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("bits", "byte", "white"), [(1, 0b10110000, 255), (2, 0b11000000, 255), (4, 0xF0, 255)])
def test_narrow_grey_is_spread_to_white(bits, byte, white):
    rows = np.full((2, 1), byte, np.uint8)
    grey = seen(png(bits, 0, rows))
    assert grey[0, 0, 0] == white and grey[0, 1, 0] == 0


# --- colour


def test_what_is_transparent_is_shown_on_white():
    layers = np.zeros((1, 3, 4), np.uint8)
    layers[0, :, 3] = 0, 128, 255
    assert seen(encoded(Image.fromarray(layers), "PNG"))[0, :, 0].tolist() == [255, 127, 0]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert seen(encoded(palette, "PNG", transparency=0))[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert seen(encoded(grey, "PNG", transparency=7))[0, :, 0].tolist() == [255, 9]


def test_an_opaque_alpha_channel_changes_no_pixel():
    layers = np.dstack([PICTURE, np.full(PICTURE.shape[:2], 255, np.uint8)])
    assert (seen(encoded(Image.fromarray(layers), "PNG")) == PICTURE).all()


@pytest.mark.parametrize(("mode", "file_format"), [("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("L", "JPEG"), ("1", "PNG")])
def test_every_mode_is_shown_in_colour(mode, file_format):
    image = Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(seen(encoded(image, file_format)).astype(int) - expected).max() <= 3


def swapped_primaries() -> bytes:
    """sRGB's profile with the red and the green colorant exchanged and no name: pure red is shown as green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"sRGB", b"none"))
    wide = "sRGB".encode("utf-16-be")
    profile = bytearray(bytes(profile).replace(wide, "none".encode("utf-16-be")))
    tags = {}
    for number in range(struct.unpack(">I", profile[128:132])[0]):
        start = 132 + 12 * number
        tags[bytes(profile[start : start + 4])] = start
    red, green = tags[b"rXYZ"] + 4, tags[b"gXYZ"] + 4
    profile[red : red + 8], profile[green : green + 8] = profile[green : green + 8], profile[red : red + 8]
    return bytes(profile)


def test_a_profile_is_obeyed_and_one_that_is_damaged_is_passed_over():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    shown = seen(encoded(red, "PNG", icc_profile=swapped_primaries()))[0, 0]
    assert shown[1] > 250 and shown[0] < 5
    assert seen(encoded(red, "PNG", icc_profile=b"no profile"))[0, 0].tolist() == [255, 0, 0]
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.fromarray(PICTURE)
    assert (seen(encoded(noise, "PNG", icc_profile=plain)) == PICTURE).all(), "sRGB is what is meant anyway"


# --- frames


@pytest.mark.parametrize(
    ("file_format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_of_several_frames_the_first_is_read(file_format, options):
    first, second = Image.new("RGB", (8, 6), (255, 0, 0)), Image.new("RGB", (8, 6), (0, 0, 255))
    content = encoded(first, file_format, save_all=True, append_images=[second], **options)
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 2
    assert (seen(content) == (255, 0, 0)).all()


# --- what is refused


@pytest.mark.parametrize("pillows_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_decompression_bomb_is_refused_from_its_header(pillows_limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    side = 14_000
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = b"IHDR" + header
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + png(8, 0, PICTURE[..., 0])[33:]
    )
    assert side * side > MAX_PIXELS
    message = "an image of more than 178,956,970 pixels is not read; make it smaller"
    for reading in (read_image, image_size):
        with pytest.raises(ImageError) as caught:
            reading(bomb)
        assert str(caught.value) == message


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_picture_that_is_cut_off_is_refused_in_one_line(file_format, share):
    content = encoded(Image.fromarray(PICTURE).resize((300, 200)), file_format)
    with pytest.raises(ImageError) as caught:
        read_image(content[: int(len(content) * share)])
    assert str(caught.value).startswith("its ") and "cannot be decoded (" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"%PDF-1.4\n",
    ],
)
def test_what_is_no_picture_is_refused_and_nothing_is_run_to_see(content):
    with pytest.raises(ImageError) as caught:
        read_image(content)
    assert str(caught.value) == (
        f"its {len(content)} image bytes cannot be decoded (UnidentifiedImageError: cannot identify image)"
    )
    with pytest.raises(ImageError, match=r"^its \d+ image bytes cannot be opened \(UnidentifiedImageError\)$"):
        image_size(content)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "a.jpg")
    assert str(caught.value) == f"{tmp_path / 'a.jpg'}: no such image file"


def test_a_row_with_a_damaged_picture_is_a_record_error():
    with pytest.raises(RecordError, match=r"^column 'image': its 3 image bytes cannot be opened"):
        list(
            get_benchmark("refcoco").read(
                {"question_id": "1", "image": {"bytes": b"abc", "path": None}, "bbox": [0, 0, 1, 1], "answer": ["a"]}
            )
        )
