from __future__ import annotations

import httpx
import pytest

from guard.errors import InputError, TooLargeError
from handlers.multipart import Part, is_multipart, split_multipart

TYPE = b"multipart/form-data; boundary=X"
DISPOSITION = b'Content-Disposition: form-data; name="a"; filename="a.png"'


def part(data: bytes, *headers: bytes) -> bytes:
    return b"--X\r\n" + b"\r\n".join(headers or (DISPOSITION,)) + b"\r\n\r\n" + data + b"\r\n"


def split(body: bytes, content_type: bytes = TYPE, max_parts: int = 8) -> list[bytes]:
    return [found.data for found in split_multipart(body, [content_type], max_parts)]


def test_parts_come_byte_for_byte_and_in_order() -> None:
    files = [b"\r\n--Y\r\n\x00\xff", b"", b"--", b"\r\n\r\n"]
    assert split(b"".join(map(part, files)) + b"--X--\r\n") == files
    assert split(part(b"one") + b"--X--") == [b"one"]


def test_what_a_client_library_sends_is_read() -> None:
    request = httpx.Request("POST", "http://test", files=[("a", ("x.png", b"1")), ("b", b"2")], data={"top_k": "3"})
    parts = split_multipart(request.read(), [request.headers["content-type"].encode()], 8)
    assert Part("top_k", b"3") in parts
    assert [found.data for found in parts if found.field is None] == [b"1", b"2"]


@pytest.mark.parametrize(
    "content_type",
    [
        b'Multipart/Form-Data; Boundary="X"',
        b"multipart/form-data;boundary=X",
        b"multipart/form-data; charset=utf-8; boundary=X",
        b"multipart/form-data; boundary=X; charset=utf-8",
    ],
)
def test_usual_content_types_are_read(content_type: bytes) -> None:
    assert split(part(b"1") + b"--X--\r\n", content_type) == [b"1"]


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=X; boundary=Y",
        b"multipart/form-data; boundary=X; boundary*=Y",
        b"multipart/mixed; boundary=X",
        b"multipart/form-data; boundary=" + b"X" * 71,
        b'multipart/form-data; boundary="X',
        b"image/png, multipart/form-data; boundary=X",
    ],
)
def test_a_content_type_with_two_readings_is_refused(content_type: bytes) -> None:
    with pytest.raises(InputError, match="expected one Content-Type"):
        split(part(b"1") + b"--X--\r\n", content_type)


def test_two_content_types_are_refused() -> None:
    with pytest.raises(InputError, match="expected one Content-Type"):
        split_multipart(part(b"1") + b"--X--\r\n", [TYPE, TYPE], 8)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--X--\r\n",
        part(b"1"),
        part(b"1") + b"--X-",
        part(b"1")[:-4],
        b"preamble\r\n" + part(b"1") + b"--X--\r\n",
        b"\r\n" + part(b"1") + b"--X--\r\n",
        part(b"1") + b"--X--\r\nepilogue",
        part(b"1") + b"--X--\r\n" + part(b"2") + b"--X--\r\n",
        part(b"1\r\n--XY") + b"--X--\r\n",
        b"--X\r\n" + DISPOSITION + b"\r\n--X--\r\n",
        part(b"1", b"Content-Type: image/png") + b"--X--\r\n",
        part(b"1", DISPOSITION, DISPOSITION) + b"--X--\r\n",
        part(b"1", DISPOSITION, b"Content-Transfer-Encoding: base64") + b"--X--\r\n",
        part(b"1", DISPOSITION, b" folded") + b"--X--\r\n",
        part(b"1", DISPOSITION + b"\nX-A: b") + b"--X--\r\n",
        part(b"1", DISPOSITION, b"X-Long: " + b"a" * 9000) + b"--X--\r\n",
        part(b"1", DISPOSITION, b"no colon") + b"--X--\r\n",
        part(b"1").replace(b"\r\n", b"\n") + b"--X--\n",
    ],
)
def test_a_malformed_body_is_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        split(body)


def test_too_many_parts_are_refused() -> None:
    body = part(b"1") * 3 + b"--X--\r\n"
    assert split(body, max_parts=3) == [b"1"] * 3
    with pytest.raises(TooLargeError, match="at most 2 parts, got 3"):
        split(body, max_parts=2)


def test_only_a_plain_form_field_is_no_file() -> None:
    dispositions = {
        b'form-data; name="a"': "a",
        b'form-data; name="a"; filename="x"': None,
        b"form-data; name=\"a\"; filename*=utf-8''x": None,
        b'form-data; filename="x"; name="a"': None,
        b'form-data; name="a\\"; filename=x"': None,
        b"attachment": None,
    }
    for disposition, field in dispositions.items():
        body = part(b"1", b"Content-Disposition: " + disposition) + b"--X--\r\n"
        assert split_multipart(body, [TYPE], 1) == [Part(field, b"1")], disposition


def test_anything_that_looks_like_multipart_is_read_as_such() -> None:
    assert is_multipart([b"image/png", b" Multipart/x"])
    assert not is_multipart([b"image/png"])
    assert not is_multipart([])
