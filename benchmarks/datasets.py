"""Image sets from the files that people have: found in a folder, read, and cut into parts (see `parts`).

`python -m benchmarks.datasets fetch --set mnist --data FOLDER` downloads a set from OpenML into `FOLDER/mnist.npz`, and
`python -m benchmarks.datasets splits` draws the committed splits again.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final, get_args

from benchmarks.entry import enter
from benchmarks.formats.cifar_binary import read_cifar_binary
from benchmarks.formats.cifar_python import read_cifar_python
from benchmarks.formats.gtsrb import read_gtsrb
from benchmarks.formats.idx import read_idx
from benchmarks.formats.npz import read_npz, write_npz
from benchmarks.formats.openml import OPENML, fetch_raw_set
from benchmarks.formats.raw_set import RawSet, SetName
from benchmarks.parts import Parts, cut, defender_rows, draw_defender_rows, validation_rows, write_splits
from guard.errors import InputError

__all__ = [
    "DEFAULT_FOLDER",
    "FILES",
    "Parts",
    "SetName",
    "defender_rows",
    "draw_defender_rows",
    "load_parts",
    "read_raw_set",
    "validation_rows",
]

FILES: dict[SetName, str] = {
    "mnist": "mnist.npz",
    "fashion_mnist": "fashion_mnist.npz",
    "gtsrb": "gtsrb.webp.npz",
    "cifar10": "cifar10.webp.npz",
    "cifar100": "cifar100.npz",
}
DEFAULT_FOLDER = Path(__file__).parent.parent.parent / "shared" / "data"


@final
@dataclass(frozen=True)
class _Format:
    """Files of one format, in words for messages, and what reads them."""

    files: str
    read: Callable[[SetName, Path], RawSet | None]


_IDX = "train-images-idx3-ubyte (or .gz) with its three others, there or in {}"
_FORMATS: dict[SetName, tuple[_Format, ...]] = {
    "mnist": (_Format(_IDX.format("MNIST/raw"), read_idx),),
    "fashion_mnist": (_Format(_IDX.format("FashionMNIST/raw"), read_idx),),
    "gtsrb": (_Format("GTSRB/Final_Training and GTSRB/Final_Test", read_gtsrb),),
    "cifar10": (_Format("cifar-10-batches-bin", read_cifar_binary), _Format("cifar-10-batches-py", read_cifar_python)),
    "cifar100": (_Format("cifar-100-binary", read_cifar_binary), _Format("cifar-100-python", read_cifar_python)),
}


def load_parts(name: SetName, folder: Path = DEFAULT_FOLDER, *, download: bool = False) -> Parts:
    """Load a set.

    Args:
        name: Which.
        folder: Where its files lie: `NAME.npz`, `NAME.webp.npz` or the official ones, the first that is found.
        download: Fetch it from OpenML when there are none.

    Raises:
        InputError: No files, or damaged, incomplete or another set's.
    """
    raw = read_raw_set(name, folder)
    if raw is None and download:
        raw = fetch_raw_set(name)
    if raw is None:
        looked_for = ", ".join([f"{name}.npz", f"{name}.webp.npz", *(each.files for each in _FORMATS[name])])
        raise InputError(f"expected {name} in {folder} ({looked_for}), got none: {_advice(name, folder)}")
    return cut(raw)


def read_raw_set(name: SetName, folder: Path) -> RawSet | None:
    """Read a set's files as they are, uncut, of any size; None when there are none.

    Raises:
        InputError: Damaged, incomplete or another set's.
    """
    for read in (read_npz, *(each.read for each in _FORMATS[name])):
        raw = read(name, folder)
        if raw is not None:
            return raw
    return None


def _advice(name: SetName, folder: Path) -> str:
    other = "or pass the folder that holds it with --data"
    if name not in OPENML:
        return f"unpack GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip there, {other}"
    return f"run python -m benchmarks.datasets fetch --set {name} --data {shlex.quote(str(folder))}, {other}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download a set from OpenML into NAME.npz")
    fetch.add_argument("--set", choices=get_args(SetName), dest="name", required=True)
    fetch.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder to write to")
    commands.add_parser("splits", help="draw the committed splits again")
    chosen = parser.parse_args(arguments)
    if chosen.command == "splits":
        write_splits()
        return
    raw = fetch_raw_set(chosen.name)
    cut(raw)  # what can't be cut is not worth keeping
    print(f"wrote {write_npz(raw, chosen.data)}: {len(raw.train)} training and {len(raw.test)} test images")


if __name__ == "__main__":
    enter(main)
