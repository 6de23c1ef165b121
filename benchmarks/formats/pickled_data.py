"""Numbers, strings, lists, dicts and integer arrays from a pickle that is never unpickled.

CIFAR's Python version is pickles, and a pickle is a program that may call anything. Here `pickletools` only lists its
opcodes, and a tiny machine follows the few that plain data needs. A global is a word in a closed list, not an import:
numpy's three are rebuilt with `np.frombuffer`, any other ends the reading.
"""

from __future__ import annotations

import enum
import math
import pickletools
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray


class NotPlainDataError(Exception):
    """The bytes are no pickle, or one that does more than hold plain data."""


class _Global(enum.Enum):
    RECONSTRUCT = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    ENCODE = enum.auto()


_GLOBALS = {
    "numpy.core.multiarray _reconstruct": _Global.RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _Global.RECONSTRUCT,
    "numpy ndarray": _Global.NDARRAY,
    "numpy dtype": _Global.DTYPE,
    "_codecs encode": _Global.ENCODE,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1"}
_BYTES_OR_TEXT = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINUNICODE", "BINUNICODE"}
_PYTHON_2_STRINGS = {"SHORT_BINSTRING", "BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MOST_AXES = 4
_INTEGER = re.compile(r"[iu][1248]")


@final
@dataclass
class _Array:
    values: NDArray[np.generic] | None = None


@final
@dataclass
class _Dtype:
    code: str
    order: str = "="


@final
@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _NUMBERS or opcode in _BYTES_OR_TEXT:
            self.stack.append(argument)
        elif opcode in _PYTHON_2_STRINGS:
            self.stack.append(argument.encode("latin-1"))
        elif opcode in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[opcode])))
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            self._build(opcode, argument)

    def _build(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "MARK":
                self.marks.append(len(self.stack))
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "TUPLE":
                self.stack.append(tuple(self._pop_to_mark()))
            case "APPEND" | "APPENDS":
                _extend(*self._split(self._pop(1) if opcode == "APPEND" else self._pop_to_mark()))
            case "SETITEM" | "SETITEMS":
                _set_items(*self._split(self._pop(2) if opcode == "SETITEM" else self._pop_to_mark()))
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GLOBAL":
                self.stack.append(_global(argument))
            case "STACK_GLOBAL":
                self.stack.append(_global(" ".join(self._pop(2))))
            case "REDUCE":
                self.stack.append(_reduce(*self._pop(2)))
            case "BUILD":
                _set_state(*self._split(self._pop(1)))
            case _:
                raise NotPlainDataError(f"opcode {opcode}")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise NotPlainDataError("an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _split(self, items: list[Any]) -> tuple[Any, list[Any]]:
        return self.stack[-1], items


def read_pickled_data(data: bytes) -> dict[str, Any]:
    """The dict that a pickle describes, with arrays in place of numpy's.

    Args:
        data: Of protocol 2 or later, also Python 2's.

    Returns:
        By key; bytes keys, which Python 2's strings are, as text.

    Raises:
        NotPlainDataError: It says what was met. Nothing of the pickle was called.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings(action="ignore"):  # damaged names may hold odd escapes
            for opcode, argument, _ in pickletools.genops(data):
                machine.step(opcode.name, argument)
        (result,) = machine.stack
        if not isinstance(result, dict):
            raise NotPlainDataError(f"a {type(result).__name__}, not a dict")
        return {_text(key): _finished(value) for key, value in result.items()}
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise NotPlainDataError("damaged opcodes") from error


def _global(name: str) -> _Global:
    if name not in _GLOBALS:
        raise NotPlainDataError(f"global {name.replace(' ', '.')[:80]!r}")
    return _GLOBALS[name]


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise NotPlainDataError("items for what is no list")
    target.extend(items)


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise NotPlainDataError("items for what is no dict")
    if not all(isinstance(key, bytes | str) for key in items[::2]):  # hashing a deep tuple could overflow the stack
        raise NotPlainDataError("a key that is no text")
    target.update(zip(items[::2], items[1::2], strict=True))


def _reduce(what: Any, arguments: Any) -> _Array | _Dtype | bytes:
    match what, arguments:
        case _Global.RECONSTRUCT, (_Global.NDARRAY, (0,), b"b" | "b"):
            return _Array()
        case _Global.DTYPE, (bytes() | str() as code, 0, 1) if _INTEGER.fullmatch(_text(code)):
            return _Dtype(_text(code))
        case _Global.ENCODE, (str() as text, "latin1"):
            return text.encode("latin-1")
    raise NotPlainDataError("a call that no array needs")


def _set_state(target: Any, items: list[Any]) -> None:
    match target, items[0]:
        case _Dtype(), (int(), bytes() | str() as order, None, None, None, -1, -1, *flags) if not any(flags):
            if _text(order) not in ("<", ">", "|", "="):
                raise NotPlainDataError("a byte order that no array has")
            target.order = _text(order)
        case _Array(), (1, tuple() as shape, _Dtype() as kind, bool() as by_column, bytes() as values):
            dtype = np.dtype(kind.order + kind.code)
            if len(shape) > _MOST_AXES or any(not isinstance(size, int) or size < 0 for size in shape):
                raise NotPlainDataError("a shape that no array has")
            if math.prod(shape) * dtype.itemsize != len(values):
                raise NotPlainDataError(f"{len(values)} bytes for an array of another size")
            target.values = np.frombuffer(values, dtype).reshape(shape, order="F" if by_column else "C")
        case _:
            raise NotPlainDataError("a state that no array has")


def _text(value: Any) -> str:
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise NotPlainDataError(f"a {type(value).__name__} where a name belongs")
    return text


def _finished(value: Any) -> Any:
    return value.values if isinstance(value, _Array) else value
