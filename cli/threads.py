"""How many threads a command's forward passes get."""

from __future__ import annotations

import time

import torch

from guard import Predictor

_IMAGES = 32


def settle_threads(predictor: Predictor) -> None:
    """Keep PyTorch's own number of threads, or one, whichever runs the model faster just now.

    A small model gains little from more threads, and loses a lot where another process keeps a core busy.
    """
    images = torch.full((_IMAGES, *predictor.spec.shape), 0.5)
    predictor(images)  # the first pass pays for set-up
    seconds: dict[int, float] = {}
    for threads in (torch.get_num_threads(), 1):
        torch.set_num_threads(threads)
        started = time.perf_counter()
        predictor(images)
        predictor(images)
        seconds[threads] = time.perf_counter() - started
    torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))
