"""Values that are one of a few names: what a type checker sees of them, at run time too."""

from __future__ import annotations

from typing import get_args

from guard.errors import GuardError, InputError


def check_choice(name: str, value: object, known: object, error: type[GuardError] = InputError) -> None:
    """Refuse what is none of them.

    Args:
        name: Of the value, for people.
        value: What was given.
        known: A `Literal`.
        error: Raised with a line that names them all.
    """
    if value not in get_args(known):
        raise error(f"expected {name} to be one of {', '.join(get_args(known))}, got {value!r}")
