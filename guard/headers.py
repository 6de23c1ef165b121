"""Image files that would cost far more time than their pixels.

Pillow reads headers in Python: ten megabytes of JPEG markers, of PNG chunks or of comments in a GIF or a plain PPM keep it
busy for seconds to minutes. No camera and no library writes such files. Two kinds of pixels are decoded in Python, too: BMP
with run-length encoding, and PPM with another highest value than bytes have.
"""

from __future__ import annotations

import re

from guard.errors import ImageError

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_PPM_NUMBER = rb"\s(?:\s|#[^\r\n]{0,200}[\r\n]){0,100}([1-9]\d{0,4})"
_PPM_HEADER = re.compile(rb"P(?:4" + _PPM_NUMBER * 2 + rb"|[56]" + _PPM_NUMBER * 3 + rb")\s")
_IN_C = {b"P5": (255, 65535), b"P6": (255,)}  # highest values of what is not decoded in Python
_SAMPLES = 200_000  # of others, and bytes of run lengths, so that a photo of 224x224 pixels passes: a third of a second
_BMP_HEADER, _RUN_LENGTHS = 40, (1, 2)  # bytes of the first that names a compression, and the two that cost
_MARKERS = 5_000
_SCANS = 40  # several times as many as a progressive JPEG needs
_EXIFS = 4
_GIF_BLOCKS = 5_000
_GIF_EXTENSION, _GIF_IMAGE, _GIF_END = 0x21, 0x2C, 0x3B
_CHUNKS = 20_000


def check_header(data: bytes) -> None:
    """Raise when a file would cost far more than its pixels: few but attackers make such files.

    Raises:
        ImageError: It says which.
    """
    if data.startswith(b"\xff\xd8"):
        costly = _is_costly_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        costly = _png_chunks(data) > _CHUNKS
    elif data.startswith(b"GIF8"):
        costly = _is_costly_gif(data)
    elif data.startswith(b"P"):
        costly = _is_costly_ppm(data)
    elif data.startswith(b"BM"):
        costly = len(data) > _SAMPLES and _has_run_lengths(data)
    else:
        costly = False
    if costly:
        raise ImageError("expected an ordinary image, got one with an abnormal header or coding: save it as PNG")


def _is_costly_jpeg(data: bytes) -> bool:
    """Walk the segments as a decoder does, up to the end of the image: what a phone appends (a film, say) is not read."""
    steps, scans, exifs, position = 0, 0, 0, 2
    while position + 4 <= len(data):
        steps += 1
        if steps > _MARKERS or scans > _SCANS or exifs > _EXIFS:
            return True
        if scans:  # compressed data: on to the next marker
            found = _JPEG_MARKER.search(data, position)
            if found is None:
                return False
            position = found.start()
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:
            position += 1  # fill bytes and rubbish, which Pillow takes one at a time
        elif marker == 0xD9:
            return False
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            position += 2
        else:
            scans += marker == 0xDA  # each scan of a progressive JPEG costs a pass over all pixels
            exifs += marker == 0xE1 and data[position + 4 : position + 8] == b"Exif"  # their texts are joined one by one
            position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
    return False


def _is_costly_ppm(data: bytes) -> bool:
    """Plain ones, those without an ordinary header, and many pixels that Pillow scales one by one."""
    header, kind = _PPM_HEADER.match(data), data[:2]
    if header is None:
        return True
    width, height, *highest = (int(number) for number in header.groups() if number is not None)
    if kind not in _IN_C or highest[0] in _IN_C[kind]:
        return False
    return width * height * (3 if kind == b"P6" else 1) > _SAMPLES


def _has_run_lengths(data: bytes) -> bool:
    """Of a BMP."""
    return int.from_bytes(data[14:18], "little") >= _BMP_HEADER and int.from_bytes(data[30:34], "little") in _RUN_LENGTHS


def _is_costly_gif(data: bytes) -> bool:
    """Walk the blocks up to the first image, with the rubbish between them that Pillow takes one byte at a time."""
    flags = data[10] if len(data) > 10 else 0
    steps, position = 0, 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    while position < len(data) and data[position] not in (_GIF_IMAGE, _GIF_END):
        steps += 1
        if data[position] != _GIF_EXTENSION:
            position += 1
        else:
            position += 2
            while position < len(data) and data[position] and steps <= _GIF_BLOCKS:
                steps += 1
                position += 1 + data[position]
            position += 1
        if steps > _GIF_BLOCKS:
            return True
    return False


def _png_chunks(data: bytes) -> int:
    count, position = 0, 8
    while position + 12 <= len(data) and count <= _CHUNKS:
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        count += 1
    return count
