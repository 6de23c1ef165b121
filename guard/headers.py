"""Image files whose headers would cost far more time than their pixels.

Pillow reads headers in Python: ten megabytes of JPEG markers, of PNG chunks or of comments in a plain PPM keep it busy for
seconds to minutes. No camera and no library writes such files.
"""

from __future__ import annotations

import re

from guard.errors import ImageError

_JPEG_MARKERS = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_PPM_HEADER = re.compile(rb"P[456](?:(?:\s|#[^\n]{0,200}\n){1,100}\d{1,5}){2,3}\s")
_MARKERS = 5_000
_SCANS = 100
_EXIFS = 16
_FILL = b"\xff" * 1_000
_CHUNKS = 20_000


def check_header(data: bytes) -> None:
    """Raise when a file's header is of a kind that only attacks have.

    Raises:
        ImageError: It says which.
    """
    if data.startswith(b"\xff\xd8"):
        costly = (
            data.count(b"\xff\xda") > _SCANS  # each scan of a progressive JPEG costs a pass over all pixels
            or data.count(b"Exif\0\0") > _EXIFS  # their texts are joined one by one
            or _FILL in data
            or sum(1 for _ in _JPEG_MARKERS.finditer(data)) > _MARKERS
        )
    elif data.startswith(b"\x89PNG"):
        costly = _png_chunks(data) > _CHUNKS
    elif data.startswith(b"P"):
        costly = _PPM_HEADER.match(data) is None  # plain PPM is decoded in Python too
    else:
        costly = False
    if costly:
        raise ImageError("expected an ordinary image, got one with an abnormal header: save the image again")


def _png_chunks(data: bytes) -> int:
    count, position = 0, 8
    while position + 12 <= len(data) and count <= _CHUNKS:
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        count += 1
    return count
