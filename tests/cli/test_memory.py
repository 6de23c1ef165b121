"""Freed memory is kept: a second pass gets hardly a page from the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PASSES = """
import resource, sys
import torch
from cli.memory import keep_freed_memory

told = keep_freed_memory()
torch.set_num_threads(1)

def work():
    values = torch.ones(1 << 22)  # 16 MB
    for _ in range(20):
        values = values + 1.0

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def passes(**environment: str) -> tuple[bool, int]:
    """Whether the C library was told, and the pages that the second pass got."""
    done = subprocess.run(
        [sys.executable, "-c", _PASSES],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**{name: value for name, value in os.environ.items() if "MALLOC" not in name}, **environment},
    )
    told, pages = done.stdout.split()
    return told == "True", int(pages)


@pytest.mark.skipif(sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc alone can be told")
def test_a_second_pass_gets_its_memory_from_the_first() -> None:
    told, pages = passes()
    assert told
    as_usual, of_old = passes(MALLOC_TOP_PAD_="0")
    assert not as_usual  # the user has told it otherwise
    assert pages < 0.1 * of_old
