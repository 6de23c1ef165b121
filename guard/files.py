"""Files that a user names: images found in folders, and names as text."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from guard.decoding import SUFFIXES


def list_images(folder: Path, deep: bool = False) -> list[Path]:
    """Image files in a folder, and with `deep` in the folders below it, sorted by name; what is hidden is left out.

    Links are followed; of several ways into a folder one is taken, and none leads back up.

    Raises:
        OSError: A folder can't be read.
    """
    found: list[Path] = []
    real = folder.resolve()
    entered, waiting = {real, *real.parents}, [folder]
    while waiting:
        for item in sorted(waiting.pop().iterdir()):
            if item.name.startswith("."):
                continue
            if item.suffix.lower() in SUFFIXES and item.is_file():
                found.append(item)
            elif deep and item.is_dir() and (place := item.resolve()) not in entered:
                entered.add(place)
                waiting.append(item)
    return sorted(found)


def is_text(name: str | Path) -> bool:
    """Whether a name is text: those of files may be any bytes, which JSON does not hold."""
    return as_text(name) == str(name)


def as_text(name: str | Path) -> str:
    r"""A name, or a message with one, as text: bytes that are not UTF-8 become `\xe9`."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    r"""Text on one line, without what steers a terminal: a newline becomes `\n`. Blanks of any width stay."""
    return "".join(
        character if character.isprintable() or unicodedata.category(character) == "Zs" else repr(character)[1:-1]
        for character in text
    )
