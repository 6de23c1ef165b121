"""A model's answer through a preprocessor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from guard.preprocessors.gym import Gym
from guard.preprocessors.preprocessor import Preprocessor


def answer_through(
    predict: Callable[[Tensor], Tensor], preprocessor: Preprocessor | None, images: Tensor, generator: torch.Generator
) -> Tensor:
    """Answer images that a preprocessor has changed; of GYM's the mean over its views.

    Args:
        predict: Images to probabilities.
        preprocessor: None for none.
        images: (B, C, H, W), in [0, 1].
        generator: A CPU generator; the preprocessor draws from it.

    Returns:
        (B, M), probabilities.
    """
    if preprocessor is None:
        return predict(images)
    if not isinstance(preprocessor, Gym) or preprocessor.views == 1:
        return predict(preprocessor(images, generator))
    filtered = preprocessor.filter(images)
    views = [predict(preprocessor.sat(filtered, generator)) for _ in range(preprocessor.views)]
    return torch.stack(views).mean(dim=0)
