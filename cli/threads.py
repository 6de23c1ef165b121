"""How many threads a command's forward passes get."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from guard import Predictor
from guard.errors import ModelError

_IMAGES = 32


def settle_threads(predictor: Predictor) -> None:
    """Keep PyTorch's own number of threads, or one, whichever runs the model faster just now.

    A small model gains little from more threads, and loses a lot where another process keeps a core busy. Noise is what it is
    asked with; one that can't answer that keeps PyTorch's number, and may well answer images.
    """
    images = torch.rand((_IMAGES, *predictor.spec.shape), generator=torch.Generator().manual_seed(0))
    usual = torch.get_num_threads()
    try:
        predictor(images)  # the first pass pays for set-up
        seconds = {threads: _seconds(predictor, images, threads) for threads in (usual, 1)}
    except ModelError:
        torch.set_num_threads(usual)
        return
    torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))


def _seconds(predictor: Predictor, images: Tensor, threads: int) -> float:
    torch.set_num_threads(threads)
    started = time.perf_counter()
    predictor(images)
    predictor(images)
    return time.perf_counter() - started
