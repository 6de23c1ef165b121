from __future__ import annotations

import io
import random
import resource
import struct
import time
import zlib
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from guard import Limits, decode_image
from guard.decoding import count_pixels
from guard.errors import ImageError, InputError, TooLargeError
from guard.images import InputSpec

RGB = InputSpec(channels=3, height=6, width=8)
GREY = InputSpec(channels=1, height=6, width=8)
BIG = 10_000_000
"""Bytes of the files that try to keep the decoder busy: the default limit lets them in."""


def pixels(seed: int = 0, channels: int = 3) -> NDArray[np.uint8]:
    shape = (6, 8, channels) if channels > 1 else (6, 8)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image | NDArray[Any], container: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, container, **options)
    return buffer.getvalue()


def levels(image: torch.Tensor) -> NDArray[np.uint8]:
    """(C, H, W) in [0, 1] back to (H, W, C) in 0..255."""
    exact = image.permute(1, 2, 0).numpy() * 255
    assert np.abs(exact - exact.round()).max() < 1e-4
    return exact.round().astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunks: bytes) -> bytes:
    """A PNG with more chunks between header and pixels."""
    data = encode(pixels())
    return data[:33] + chunks + data[33:]


@pytest.mark.parametrize("container", ["PNG", "BMP", "PPM", "GIF", "WEBP"])
def test_lossless_formats_are_exact(container: str) -> None:
    options = {"WEBP": {"lossless": True}}.get(container, {})
    image = Image.fromarray(pixels())
    if container == "GIF":
        image = image.quantize(48, dither=Image.Dither.NONE)
    decoded = decode_image(encode(image, container, **options), RGB)
    assert decoded.dtype == torch.float32
    assert decoded.shape == (3, 6, 8)
    assert np.array_equal(levels(decoded), np.asarray(image.convert("RGB")))


def test_jpeg_is_what_pillow_decodes() -> None:
    data = encode(pixels(), "JPEG", quality=90)
    assert np.array_equal(levels(decode_image(data, RGB)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes(kind: type[bytes]) -> None:
    assert np.array_equal(levels(decode_image(kind(encode(pixels())), RGB)), pixels())


def test_grey_becomes_colour() -> None:
    decoded = levels(decode_image(encode(pixels(channels=1)), RGB))
    assert np.array_equal(decoded, np.repeat(pixels(channels=1)[:, :, None], 3, axis=2))


def test_colour_becomes_luma() -> None:
    for colour, luma in (((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29), ((255, 255, 255), 255)):
        data = encode(Image.new("RGB", (8, 6), colour))
        assert set(levels(decode_image(data, GREY)).ravel().tolist()) == {luma}


def test_palettes_and_single_bits() -> None:
    palette = Image.fromarray(pixels()).quantize(7)
    assert np.array_equal(levels(decode_image(encode(palette), RGB)), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(pixels(channels=1)).convert("1")
    assert np.array_equal(levels(decode_image(encode(bits), GREY))[:, :, 0], np.asarray(bits) * np.uint8(255))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_when_it_is_opaque(mode: str) -> None:
    image = Image.fromarray(pixels()).convert(mode)
    assert np.array_equal(levels(decode_image(encode(image), RGB)), np.asarray(image.convert("RGB")))


def transparent(mode: str) -> bytes:
    """A PNG with one pixel that is not opaque."""
    image = Image.fromarray(pixels()).convert(mode)
    alpha = Image.new("L", (8, 6), 255)
    alpha.putpixel((3, 2), 254)
    image.putalpha(alpha)
    return encode(image)


TRANSPARENT = {
    "RGBA": transparent("RGBA"),
    "LA": transparent("LA"),
    "palette": encode(Image.fromarray(pixels()).quantize(4), transparency=0),
    "palette-bytes": encode(Image.fromarray(pixels()).quantize(4), transparency=b"\xff\x80\xff\xff"),
    "RGB-key": encode(pixels(), transparency=tuple(int(value) for value in pixels()[0, 0])),
    "L-key": encode(pixels(channels=1), transparency=int(pixels(channels=1)[0, 0])),
    "1-key": encode(Image.new("1", (8, 6), 1), transparency=1),
    "I;16-key": encode(Image.fromarray(np.full((6, 8), 700, np.uint16)), transparency=700),
    "gif": encode(Image.fromarray(pixels()).quantize(4), "GIF", transparency=0),
    "webp": encode(Image.fromarray(np.dstack([pixels(), np.full((6, 8), 7, np.uint8)])), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", TRANSPARENT)
@pytest.mark.parametrize("spec", [RGB, GREY])
def test_what_lies_under_transparency_is_refused(name: str, spec: InputSpec) -> None:
    with pytest.raises(ImageError, match="expected an opaque image"):
        decode_image(TRANSPARENT[name], spec)


def test_a_transparent_colour_that_no_pixel_has_is_no_transparency() -> None:
    image = np.full((6, 8), 10, np.uint8)
    assert set(levels(decode_image(encode(image, transparency=11), GREY)).ravel().tolist()) == {10}


def test_cmyk_jpeg_becomes_colour() -> None:
    decoded = levels(decode_image(encode(Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "JPEG"), RGB)).astype(int)
    assert (decoded[:, :, 0] > 240).all()
    assert (decoded[:, :, 1:] < 15).all()


def test_sixteen_bit_grey_keeps_its_precision() -> None:
    values = np.arange(48, dtype=np.uint16).reshape(6, 8) + 1000
    decoded = decode_image(encode(Image.fromarray(values)), GREY)
    assert torch.equal((decoded[0] * 65535).round().to(torch.int64), torch.from_numpy(values.astype(np.int64)))
    assert decode_image(encode(Image.fromarray(values)), RGB).unique().numel() == 48


def pfm() -> bytes:
    return b"Pf\n8 6\n-1.0\n" + np.zeros(48, np.float32).tobytes()


def test_thirty_two_bit_pixels_are_refused() -> None:
    with pytest.raises(ImageError):
        decode_image(pfm(), GREY)


@pytest.mark.parametrize("highest", [1023, 65535])
def test_deep_grey_of_the_pgm_kind_is_scaled_by_its_own_highest(highest: int) -> None:
    values = np.linspace(0, highest, 48).round().astype(">u2")
    decoded = decode_image(b"P5\n8 6\n%d\n" % highest + values.tobytes(), GREY)
    wanted = torch.from_numpy(values.astype(np.float32)).reshape(1, 6, 8) / highest
    torch.testing.assert_close(decoded, wanted, atol=2e-5, rtol=0.0)


@pytest.mark.parametrize(("depth", "colours"), [(2, 0), (4, 0), (16, 0), (16, 2)])
def test_a_transparent_colour_of_another_depth_is_transparency(depth: int, colours: int) -> None:
    """Pillow compares it with pixels of 8 bits, and finds none that has it."""
    samples = 3 if colours == 2 else 1
    header = struct.pack(">IIBBBBB", 8, 6, depth, colours, 0, 0, 0)
    colour = (1 << depth) - 1 if depth < 16 else 0xABCD
    row = bytes([0]) + (b"\xab\xcd" * 8 * samples if depth == 16 else b"\xff" * depth)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", colour) * samples)
    with pytest.raises(ImageError, match="transparent"):
        decode_image(data + chunk(b"IDAT", zlib.compress(row * 6)) + chunk(b"IEND", b""), RGB)


def test_no_limit_is_promised_that_pillow_does_not_keep() -> None:
    assert Limits(max_pixels=178_956_970)
    with pytest.raises(InputError, match="expected max_pixels of at most 178956970, Pillow's own limit, got 178956971"):
        Limits(max_pixels=178_956_971)


def test_pixels_are_counted_by_the_header() -> None:
    assert count_pixels(encode(pixels())) == 48
    with pytest.raises(TooLargeError):
        count_pixels(encode(pixels()), Limits(max_pixels=47))
    with pytest.raises(ImageError):
        count_pixels(b"nothing")


@pytest.mark.parametrize("container", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_counts(container: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if container == "WEBP" else {}
    data = encode(frames[0], container, save_all=True, append_images=frames[1:], **options)
    assert levels(decode_image(data, RGB))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("container", ["TIFF", "ICO", "PCX", "TGA", "JPEG2000", "DDS", "PDF", "EPS"])
def test_other_formats_are_refused(container: str) -> None:
    with pytest.raises(ImageError, match="that are none"):
        decode_image(encode(pixels(), container), RGB)


@pytest.mark.parametrize(
    "data",
    [b"a", b"hello world, this is no image at all", b"\x00" * 1000, b"8BPS" + bytes(100), b"\x89PNG\r\n\x1a\n", b"GIF89a",
     b"\xff\xd8\xff", b"BM", b"RIFF\x00\x00\x00\x00WEBP", b"P6", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"II*\x00"],
)  # fmt: skip
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(ImageError) as raised:
        decode_image(data, RGB)
    assert raised.value.code == "not-an-image"
    assert "\n" not in str(raised.value)


def test_nothing() -> None:
    with pytest.raises(ImageError, match="got 0 bytes"):
        decode_image(b"", RGB)


@pytest.mark.parametrize("container", ["PNG", "JPEG", "BMP", "PPM", "WEBP"])
def test_truncated_files_are_refused(container: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    data = encode(image, container)
    whole = decode_image(data, RGB)
    refused = 0
    for end in range(1, len(data)):
        try:
            assert torch.equal(decode_image(data[:end], RGB), whole)  # only what follows the pixels is missing
        except ImageError:
            refused += 1
    assert refused > 0.8 * len(data)


def test_the_byte_limit() -> None:
    data = encode(pixels())
    assert decode_image(data, RGB, Limits(max_bytes=len(data))).shape == (3, 6, 8)
    with pytest.raises(TooLargeError, match=f"at most {len(data) - 1} bytes") as raised:
        decode_image(data, RGB, Limits(max_bytes=len(data) - 1))
    assert raised.value.code == "too-large"


@pytest.mark.parametrize("spec", [RGB, InputSpec(channels=3, height=6, width=8, resize=True)])
@pytest.mark.parametrize("side", [4_001, 10_000, 16_000])
def test_pixel_bombs_are_refused_from_their_header(spec: InputSpec, side: int) -> None:
    bomb = encode(Image.new("1", (side, side)), optimize=True)
    assert len(bomb) < 50_000
    before, start = peak(), time.process_time()
    with pytest.raises(TooLargeError):
        decode_image(bomb, spec)
    assert time.process_time() - start < 0.5
    assert peak() - before < 20


def peak() -> float:
    """Most memory that this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_the_pixel_limit() -> None:
    spec = InputSpec(channels=1, height=6, width=8, resize=True)
    assert decode_image(encode(np.zeros((10, 10), np.uint8)), spec, Limits(max_pixels=100)).shape == (1, 6, 8)
    with pytest.raises(TooLargeError, match="at most 99 pixels, got 10x10"):
        decode_image(encode(np.zeros((10, 10), np.uint8)), spec, Limits(max_pixels=99))


def gif_with_a_larger_frame() -> bytes:
    """The canvas says 8x6, the frame in it 65535x65535."""
    data = encode(Image.new("P", (8, 6)), "GIF")
    start = 13 + 3 * (2 << (data[10] & 7))
    return data[:start] + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x00;"


def gif_with(blocks: bytes) -> bytes:
    """Behind the global colour table."""
    data = encode(pixels(), "GIF")
    start = 13 + (3 << ((data[10] & 7) + 1))
    return data[:start] + blocks + data[start:]


def webp_with_a_large_canvas(side: int) -> bytes:
    frame = encode(pixels(), "WEBP", lossless=True)[12:]
    size = struct.pack("<I", side - 1)[:3]
    head = b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + size * 2 + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    frame = bytes(6) + struct.pack("<I", 7)[:3] + struct.pack("<I", 5)[:3] + bytes(4) + frame
    body = head + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def jpeg_with(segments: bytes, **options: Any) -> bytes:
    data = encode(pixels(), "JPEG", **options)
    return data[:2] + segments + data[2:]


def jpeg_with_scans(count: int) -> bytes:
    data = encode(pixels(), "JPEG", progressive=True)
    return data[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00\x00" * count + data[-2:]


def exif(text: int) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", 8 + text) + b"Exif\0\0" + b"a" * text


def bmp_with_runs(runs: bytes) -> bytes:
    """8x6 grey pixels, run-length encoded."""
    palette = b"".join(bytes([level, level, level, 0]) for level in range(256))
    header = struct.pack("<IiiHHIIiiII", 40, 8, 6, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return struct.pack("<2sIII", b"BM", 1078 + len(runs), 0, 1078) + header + palette + runs


ZEROS = zlib.compress(bytes(200_000_000), 9)
COSTLY = {
    "PNG zTXt": png_with(chunk(b"zTXt", b"a\0\0" + ZEROS)),
    "PNG iTXt": png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)),
    "PNG iCCP": png_with(chunk(b"iCCP", b"a\0\0" + ZEROS)),
    "PNG chunks": png_with(chunk(b"abCd", b"") * (BIG // 12 - 10)),
    "JPEG exif": jpeg_with(exif(10) * (BIG // 20 - 100)),
    "JPEG markers": jpeg_with(b"\xff\xe5\0\2" * (BIG // 4 - 1000)),
    "JPEG comments": jpeg_with(b"\xff\xfe\0\3a" * (BIG // 5 - 1000)),
    "JPEG fill bytes": jpeg_with(b"\xff" * (BIG - 1000)),
    "JPEG scans": jpeg_with_scans(BIG // 11 - 100),
    "PPM comment": b"P6\n#" + b"a" * (BIG - 200) + b"\n8 6\n255\n" + bytes(144),
    "PPM comments": b"P6\n" + b"#\n" * (BIG // 2 - 100) + b"8 6\n255\n" + bytes(144),
    "PPM blanks": b"P6" + b" " * (BIG - 200) + b"8 6\n255\n" + bytes(144),
    "plain PPM": b"P3\n8 6\n255\n" + b"#a\n" * (BIG // 3 - 1000) + b"0 " * 144,
    "BMP ends of lines": bmp_with_runs(b"\0\0" * (BIG // 2 - 1000)),
    "BMP steps": bmp_with_runs(b"\0\2\0\0" * (BIG // 4 - 1000)),
    "GIF frame": gif_with_a_larger_frame(),
    "GIF comments": gif_with(b"!\xfe" + b"\x01a" * (BIG // 2 - 100) + b"\0"),
    "GIF blocks": gif_with(b"!\xfe\x01a\0" * (BIG // 5 - 100)),
    "GIF rubbish": gif_with(bytes(BIG - 1000)),
    "WebP canvas": webp_with_a_large_canvas(16_383),
}


@pytest.mark.parametrize("name", COSTLY)
def test_files_that_would_cost_much_are_refused_cheaply(name: str) -> None:
    """Seconds to minutes of Pillow's time, or gigabytes of memory, for one request."""
    before, start = peak(), time.process_time()
    with pytest.raises(InputError):
        decode_image(COSTLY[name], RGB)
    assert time.process_time() - start < 1.5
    assert peak() - before < 100


@pytest.mark.parametrize("kind", [b"P5", b"P6"])
def test_many_pixels_that_are_scaled_one_by_one_are_refused(kind: bytes) -> None:
    any_size = msgspec.structs.replace(RGB, resize=True)
    side, samples = 1500, 3 if kind == b"P6" else 1
    start = time.process_time()
    with pytest.raises(ImageError, match="save it as PNG"):
        decode_image(kind + b" %d %d 254\n" % (side, side) + bytes(side * side * samples), any_size)
    assert time.process_time() - start < 0.5
    for header in (b"%d %d 0000254\n", b"%d %d +254\n", b"%d %d 2_54\n", b"%d %d 2#\n54\n", b"#\r%d %d 254 #\n8 8\n255\n"):
        with pytest.raises(ImageError, match="save it as PNG"):
            decode_image(kind + b"\n" + header % (side, side) + bytes(side * side * samples), any_size)
    assert decode_image(kind + b" 224 224 254\n" + bytes(224 * 224 * samples), any_size).shape == (3, 6, 8)
    assert decode_image(kind + b" %d %d 255\n" % (side, side) + bytes(side * side * samples), any_size).shape == (3, 6, 8)


def test_ordinary_metadata_is_no_obstacle() -> None:
    described = Image.Exif()
    described[270] = "a picture" * 1000
    assert decode_image(encode(pixels(), "JPEG", exif=described, comment="hello", progressive=True), RGB).shape == (3, 6, 8)
    assert decode_image(gif_with(b"!\xfe" + b"\x05hello" * 100 + b"\0"), RGB).shape == (3, 6, 8)
    assert decode_image(jpeg_with_scans(20), RGB).shape == (3, 6, 8)
    assert decode_image(png_with(chunk(b"tEXt", b"Author\0me") * 100), RGB).shape == (3, 6, 8)
    assert decode_image(b"P6 # made by hand\n8\t6 # size\n255\n" + bytes(144), RGB).shape == (3, 6, 8)
    assert decode_image(b"P4\n8 6\n" + bytes(6), GREY).shape == (1, 6, 8)
    assert decode_image(bmp_with_runs(b"\x08\x10\0\0" * 6 + b"\0\1"), GREY).shape == (1, 6, 8)


def test_other_sizes_are_refused_or_resized() -> None:
    data = encode(np.full((20, 10, 3), 40, np.uint8))
    with pytest.raises(ImageError, match="expected 8x6 pixels, got 10x20: resize"):
        decode_image(data, RGB)
    resized = decode_image(data, InputSpec(channels=3, height=6, width=8, resize=True))
    torch.testing.assert_close(resized, torch.full((3, 6, 8), 40 / 255))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 5)])
def test_resizing_stays_in_range(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 2, (*shape, 3), dtype=np.uint8) * np.uint8(255)
    resized = decode_image(encode(image), InputSpec(channels=3, height=6, width=8, resize=True))
    assert resized.shape == (3, 6, 8)
    assert 0 <= resized.min() <= resized.max() <= 1


def test_models_of_other_channel_counts_take_no_files() -> None:
    with pytest.raises(ImageError, match="call it with arrays"):
        decode_image(encode(pixels()), InputSpec(channels=4, height=6, width=8))


def test_refusals_are_one_printable_line() -> None:
    """Bytes of the file must not reach a log as they are."""
    evil = b"P6\n8 6\n255\n\x1b[2J[METRICS]\n"
    with pytest.raises(ImageError) as raised:
        decode_image(evil, RGB)
    assert str(raised.value).isprintable()


def seeds() -> list[bytes]:
    image = Image.fromarray(pixels())
    described = Image.Exif()
    described[274] = 6
    twice: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(90)]}
    return [
        *(encode(image, container) for container in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM")),
        *(encode(image, container, **twice) for container in ("PNG", "GIF", "WEBP", "MPO")),
        *(encode(image.convert(mode)) for mode in ("1", "L", "P", "LA", "RGBA")),
        encode(image, "JPEG", progressive=True, exif=described),
        encode(image.convert("P"), "BMP"),
    ]


def test_damaged_files_are_refused_or_decoded_and_never_anything_else() -> None:
    draw = random.Random(0)
    files = seeds()
    spec = InputSpec(channels=3, height=6, width=8, resize=True)
    outcomes = {"decoded": 0, "refused": 0}
    for _ in range(1500):
        data = bytearray(draw.choice(files))
        for _ in range(draw.choice((1, 2, 5))):
            place = draw.randrange(draw.choice((min(64, len(data)), len(data))))
            if draw.random() < 0.7:
                data[place] = draw.choice((0, 1, 127, 255, draw.randrange(256)))
            elif draw.random() < 0.5:
                del data[place : place + draw.randrange(9)]
            else:
                data[place:place] = draw.randbytes(draw.randrange(9))
        try:
            decoded = decode_image(data, spec)
        except InputError:
            outcomes["refused"] += 1
        else:
            outcomes["decoded"] += 1
            assert decoded.shape == (3, 6, 8)
            assert torch.isfinite(decoded).all()
    assert min(outcomes.values()) > 100


def test_what_a_phone_appends_to_a_jpeg_is_not_its_header() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 77, dtype=np.uint8)).save(buffer, format="JPEG", quality=95)
    film = np.random.default_rng(0).integers(0, 256, 8 * 1024 * 1024, dtype=np.uint8).tobytes()
    spec = InputSpec(channels=1, height=8, width=8)
    assert decode_image(buffer.getvalue() + film, spec).mean().item() == pytest.approx(77 / 255, abs=0.02)
