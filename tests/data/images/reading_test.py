"""Kinds of image files: deep greys, EXIF, transparency, frames, odd sizes and rare formats."""

import io
import struct
import sys
import zlib

import cv2
import numpy as np
from PIL import Image, ImageOps
import pytest

from convit_jax.data.corrupt import CorruptImageError, ImageError
from convit_jax.data.images.decode import decode, open_image
from convit_jax.data.images.reading import AS_SHOWN, MAX_PIXELS, Reading
from convit_jax.data.images.span import Span
from convit_jax.data.images.transforms import EvalTransform, TrainTransform

GREY = np.arange(256, dtype=np.uint8).reshape(8, 32)[:, ::-1].copy()
RGB = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
WIDE = GREY.astype(np.uint16) * 257  # the same levels in 16 bits

NO_AVIF = ".avif" not in Image.registered_extensions()
AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(NO_AVIF, reason="Pillow without AVIF"))


def encode(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def tiff(values, **tags):
    """Returns a TIFF file; `tags` are named by their numbers, as t340=0.5."""
    info = {int(name[1:]): value for name, value in tags.items()}
    return encode(Image.fromarray(values), "TIFF", tiffinfo=info)


def with_tags(data, tags):
    """Returns a TIFF file in which short values of tags are changed: {tag: value}."""
    data = bytearray(data)
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", data, place)
        if tag in tags:
            struct.pack_into("<H", data, place + 8, tags[tag])
    return bytes(data)


def by_opencv(suffix, values):
    return cv2.imencode(suffix, values)[1].tobytes()


def opened(data):
    return Image.open(io.BytesIO(data))


DEEP = {
    "png": lambda: encode(Image.fromarray(WIDE)),
    "png, zeros below": lambda: encode(Image.fromarray(GREY.astype(np.uint16) << 8)),
    "png, rgb": lambda: by_opencv(".png", np.stack([WIDE] * 3, -1)),
    "png, alpha": lambda: by_opencv(".png", np.stack([*[WIDE] * 3, np.full_like(WIDE, 65535)], -1)),
    "pgm": lambda: encode(Image.fromarray(WIDE.astype(np.int32)), "PPM"),
    "ppm": lambda: by_opencv(".ppm", np.stack([WIDE] * 3, -1)),
    "jpeg 2000": lambda: encode(Image.fromarray(WIDE), "JPEG2000", irreversible=False),
    "tiff": lambda: tiff(WIDE),
    "tiff, big-endian": lambda: encode(
        Image.frombytes("I;16B", (32, 8), WIDE.astype(">u2").tobytes()), "TIFF"
    ),
    "tiff, rgb": lambda: by_opencv(".tiff", np.stack([WIDE] * 3, -1)),
    "tiff, white is zero": lambda: with_tags(tiff(~WIDE), {262: 0}),
    "tiff, int32": lambda: tiff(WIDE.astype(np.int32) * 10_000 - 7),
    "tiff, uint32": lambda: with_tags(
        tiff((WIDE.astype(np.uint32) * 65537).view(np.int32)), {339: 1}
    ),
    "tiff, float": lambda: tiff(GREY.astype(np.float32) / 255 - 3),
    "tiff, stated range": lambda: tiff(GREY[1:] / np.float32(255), t340=0.0, t341=1.0),
}


@pytest.mark.parametrize("name", DEEP)
def test_greys_of_more_than_8_bits_show_what_8_bits_show(name):
    expected = GREY[1:] if name == "tiff, stated range" else GREY
    expected = np.stack([expected] * 3, -1)
    for reading in (Reading(), AS_SHOWN):
        np.testing.assert_array_equal(decode(DEEP[name](), reading), expected)
    # Training and evaluation see the same pixels.
    data, same = DEEP[name](), encode(Image.fromarray(expected))
    evaluate, train = EvalTransform(8, 1.0), TrainTransform(8)
    np.testing.assert_array_equal(evaluate(data), evaluate(same))
    rngs = np.random.default_rng(0), np.random.default_rng(0)
    np.testing.assert_array_equal(train(data, rngs[0]), train(same, rngs[1]))


def test_12_bits_one_level_and_no_numbers():
    packed = bytes([0, 0, 16, 128, 15, 240])  # 0, 16, 2048 and 4080
    whole = tiff(np.array([[1, 2, 3, 4]], np.uint16))
    whole = whole.replace(struct.pack("<4H", 1, 2, 3, 4), packed + bytes(2))
    assert decode(with_tags(whole, {258: 12, 279: 6}))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert not decode(tiff(np.full((2, 3), 7, np.float32))).any()
    with pytest.raises(CorruptImageError, match="expected finite values, got NaN"):
        decode(tiff(np.array([[1, np.nan]], np.float32)))


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", AVIF, "CMYK", "palette"])
def test_orientations_are_those_of_pillow_or_ignored(kind):
    modes = {"CMYK": ("CMYK", "JPEG"), "palette": ("P", "PNG")}
    mode, kind = modes.get(kind, ("RGB", kind))
    for number in range(1, 9):
        data = encode(Image.fromarray(RGB).convert(mode), kind, exif=exif(number))
        expected = ImageOps.exif_transpose(opened(data)).convert("RGB")
        np.testing.assert_array_equal(decode(data, AS_SHOWN), expected)
        height, width, rows = open_image(data, reading=AS_SHOWN)
        assert (height, width) == expected.size[::-1]
        np.testing.assert_array_equal(rows(3)[:3], np.asarray(expected)[:3])
        plain = np.asarray(opened(data).convert("RGB"))  # Pillow itself turns TIFF
        np.testing.assert_array_equal(decode(data), plain)
        np.testing.assert_array_equal(open_image(data)[2](3)[:3], plain[:3])
        turned = EvalTransform(8, 1.0, reading=AS_SHOWN)(data)
        upright = EvalTransform(8, 1.0)(np.asarray(expected))
        np.testing.assert_array_equal(turned, upright)


def test_an_orientation_in_xmp_counts_and_damaged_exif_does_not():
    xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
    data = encode(Image.fromarray(RGB), "JPEG", xmp=xmp)
    assert decode(data, AS_SHOWN).shape == (12, 8, 3)
    for value in (9, 0, 65535):
        odd = encode(Image.fromarray(RGB), "JPEG", exif=exif(value))
        np.testing.assert_array_equal(decode(odd, AS_SHOWN), decode(odd))
    whole = encode(Image.fromarray(RGB), "JPEG", exif=exif(6))
    for damage in (b"XX*\0", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\0"):
        place = whole.index(b"Exif\0\0") + 6
        data = whole[:place] + damage + whole[place + len(damage) :]
        np.testing.assert_array_equal(decode(data, AS_SHOWN), decode(whole))


def with_alpha():
    rng = np.random.default_rng(1)
    alpha = rng.choice([0, 0, 100, 255, 255], (8, 12)).astype(np.uint8)
    alpha[0, :3] = 0, 100, 255
    return Image.fromarray(np.dstack([RGB, alpha]))


def few_colours():
    picture = Image.fromarray((np.arange(96, dtype=np.uint8) % 5).reshape(8, 12))
    picture.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 0, 9, 8, 7, 1, 2, 3])
    return picture


TRANSPARENT = {
    "rgba": lambda: encode(with_alpha()),
    "la": lambda: encode(with_alpha().convert("LA")),
    "webp": lambda: encode(with_alpha(), "WEBP", lossless=True, exact=True),
    "tiff": lambda: encode(with_alpha(), "TIFF"),
    "palette": lambda: encode(few_colours(), transparency=1),
    "palette of alphas": lambda: encode(few_colours(), transparency=b"\0\x64\xff"),
    "gif": lambda: encode(few_colours(), "GIF", transparency=2),
    "a colour": lambda: encode(Image.fromarray(RGB), transparency=tuple(RGB[2, 3].tolist())),
    "a grey": lambda: encode(Image.fromarray(GREY), transparency=77),
    "a grey of 16 bits": lambda: encode(Image.fromarray(WIDE), transparency=77 * 257),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_are_over_white_or_as_stored(name):
    picture = opened(data := TRANSPARENT[name]())
    if name == "a grey of 16 bits":
        stored, alpha = np.stack([GREY] * 3, -1), np.where(GREY == 77, 0, 255)[..., None]
    else:
        rgba = np.asarray(picture.convert("RGBA")).astype(int)
        stored, alpha = rgba[..., :3], rgba[..., 3:]
    assert (alpha == 0).any()
    assert (alpha == 255).any()
    np.testing.assert_array_equal(decode(data), stored)  # timm's pixels
    shown = decode(data, Reading(alpha="white"))
    np.testing.assert_array_equal(
        shown, np.floor((stored * alpha + 255 * (255 - alpha)) / 255 + 0.5)
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", AVIF])
def test_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert opened(data).n_frames == 2
    shown = decode(data, AS_SHOWN).astype(int)
    assert shown.shape == (7, 9, 3)
    assert abs(shown - (255, 0, 0)).max() < 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (2, 999)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_may_be_one_pixel_high(shape, kind):
    data = encode(Image.new("RGB", shape[::-1], (200, 200, 200)), kind)
    assert decode(data, AS_SHOWN).shape == (*shape, 3)
    for pixels in (
        EvalTransform(32)(data),
        EvalTransform((24, 32))(data),
        TrainTransform(32, randaugment_ops=0)(data, np.random.default_rng(0)),
        TrainTransform(32, randaugment_ops=0, backend="exact")(data, np.random.default_rng(0)),
    ):
        assert pixels.shape in ((32, 32, 3), (24, 32, 3))
        assert pixels.max() > 99


def test_a_long_axis_is_not_resized_as_a_whole():
    span = Span.of(200_000, 53 * 200_000, 5_000_000, 48)
    assert span.length == 48
    assert span.last - span.first < 10
    data = encode(Image.fromarray(np.repeat(np.arange(250, dtype=np.uint8), 800)[:, None]))
    pixels = EvalTransform(48, 0.9)(data)  # the whole would have 10.6 million rows
    assert {*np.unique(pixels).tolist()} == {124, 125}


def png_of(width, height):
    """Returns a small PNG file that claims a size; its pixels are missing."""
    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_what_claims_too_many_pixels_is_refused_before_it_is_decoded():
    side = int(MAX_PIXELS**0.5) + 1
    jpeg = encode(Image.fromarray(RGB), "JPEG")
    place = jpeg.index(struct.pack(">HH", 8, 12))
    jpeg = jpeg[:place] + struct.pack(">HH", side, side) + jpeg[place + 4 :]
    bmp = bytearray(encode(Image.fromarray(RGB), "BMP"))
    struct.pack_into("<ii", bmp, 18, side, side)
    for data in (jpeg, jpeg + b"\0", png_of(side, side), bytes(bmp)):
        for read in (decode, EvalTransform(32)):
            with pytest.raises(CorruptImageError, match="damaged, or to be made smaller"):
                read(data)


def test_a_film_is_no_picture():
    film = b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(40)
    with pytest.raises(CorruptImageError, match="not a readable image"):
        decode(film)


@pytest.mark.skipif(NO_AVIF, reason="this Pillow has no AVIF")
def test_a_damaged_avif_is_a_corrupt_image():
    data = encode(Image.new("RGB", (64, 32), "red"), "AVIF")
    for damaged in (data[: len(data) // 2], data[:100]):
        with pytest.raises(CorruptImageError, match="not a readable image"):
            decode(damaged)


def test_heic_is_read_by_pillow_heif_or_names_it(monkeypatch):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"b'heic'\).*pip install pillow-heif") as caught:
        decode(heic)
    assert not isinstance(caught.value, CorruptImageError)  # the package is missing
    monkeypatch.undo()
    pillow_heif = pytest.importorskip("pillow_heif")
    with pytest.raises(CorruptImageError, match="not a readable image"):
        decode(heic)
    pillow_heif.register_heif_opener()
    data = encode(Image.new("RGB", (64, 32), "red"), "HEIF")
    np.testing.assert_array_equal(decode(data, AS_SHOWN), opened(data).convert("RGB"))
