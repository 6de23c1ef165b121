"""A strict reader of multipart/form-data bodies that are already in memory.

In front of somebody else's application, a body that two parsers read differently is a way around the guard. So what
leaves room for that is refused: text before the first boundary or after the last, boundaries with unusual characters,
folded headers, encoded parts, lone carriage returns.

Reference: RFC 7578, RFC 2046 section 5.1.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from guard.errors import InputError, TooLargeError

OVERHEAD_BYTES = 64 * 1024
"""What boundaries and headers may add to the files themselves."""

_CHARSET = rb"(?:\s*;\s*charset=\"?[\w-]+\"?)?"
_CONTENT_TYPE = re.compile(
    rb"\s*multipart/form-data"
    + _CHARSET
    + rb"\s*;\s*boundary=(?:\"([\w'()+,./:=?-]{1,70})\"|([\w'+.-]{1,70}))"
    + _CHARSET
    + rb"\s*",
    re.IGNORECASE,
)
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~\w-]+):[ \t]*([^\r\n\0]*)")
_FIELD = re.compile(rb"form-data;[ \t]*name=\"([\w.\[\]-]+)\"[ \t]*", re.IGNORECASE)
_PLAIN_ENCODINGS = (b"binary", b"8bit", b"7bit")
_MAX_HEADER_BYTES = 8192


@dataclass(frozen=True)
class Part:
    """One part of a multipart body.

    Attributes:
        field: Name of a plain form field; None for everything else, which counts as a file.
        data: Its bytes.
    """

    field: str | None
    data: bytes


def is_multipart(content_types: Sequence[bytes]) -> bool:
    """Whether any parser could take a body with these Content-Type headers for multipart."""
    return any(b"multipart" in value.lower() for value in content_types)


def split_multipart(body: bytes, content_types: Sequence[bytes], max_parts: int) -> list[Part]:
    """Split a body into its parts, in order.

    Args:
        body: All of it.
        content_types: Every Content-Type header of the request.
        max_parts: Parts that are allowed.

    Returns:
        At least one part.

    Raises:
        InputError: The body or its Content-Type is malformed, or leaves room for two readings.
        TooLargeError: More than `max_parts`.
    """
    matched = _CONTENT_TYPE.fullmatch(content_types[0]) if len(content_types) == 1 else None
    if matched is None:
        raise InputError("expected one Content-Type like multipart/form-data; boundary=X, got another: send it plain")
    delimiter = b"\r\n--" + (matched[1] or matched[2])
    framed = b"\r\n" + body
    count = framed.count(delimiter) - 1
    if count > max_parts:
        raise TooLargeError(f"expected at most {max_parts} parts, got {count}: send fewer at once")
    before, *parts = framed.split(delimiter)
    if count < 1 or before or parts.pop() not in (b"--", b"--\r\n"):
        raise InputError("expected a multipart body from its first boundary to its last, got a malformed or truncated one")
    return [_part(part) for part in parts]


def _part(part: bytes) -> Part:
    head, blank, data = part.partition(b"\r\n\r\n")
    if not blank or not head.startswith(b"\r\n") or len(head) > _MAX_HEADER_BYTES:
        raise InputError("expected headers, an empty line and data in each part, got a malformed part")
    dispositions = []
    for line in head[2:].split(b"\r\n"):
        header = _HEADER.fullmatch(line)
        if header is None:
            raise InputError("expected plain headers in each part, got a malformed one")
        name, value = header[1].lower(), header[2].strip()
        if name == b"content-transfer-encoding" and value.lower() not in _PLAIN_ENCODINGS:
            raise InputError("expected binary parts, got an encoded one: send the file's bytes as they are")
        if name == b"content-disposition":
            dispositions.append(value)
    if len(dispositions) != 1:
        raise InputError(f"expected one Content-Disposition in each part, got {len(dispositions)}")
    field = _FIELD.fullmatch(dispositions[0])
    return Part(None if field is None else field[1].decode("ascii"), data)
