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
    return answer_views(predict, views_of(preprocessor, images, generator))


def answer_views(predict: Callable[[Tensor], Tensor], views: list[Tensor]) -> Tensor:
    """The mean of the answers, (B, M), to what `views_of` has drawn."""
    answers = [predict(view) for view in views]
    return answers[0] if len(answers) == 1 else torch.stack(answers).mean(dim=0)


def views_of(preprocessor: Preprocessor | None, images: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Images as a model is to see them: once, or as often as GYM draws.

    Args:
        preprocessor: None for none.
        images: (B, C, H, W), in [0, 1].
        generator: A CPU generator; the preprocessor draws from it.

    Returns:
        One or several of (B, C, H, W).
    """
    if preprocessor is None:
        return [images]
    if not isinstance(preprocessor, Gym) or preprocessor.views == 1:
        return [preprocessor(images, generator)]
    filtered = preprocessor.filter(images)
    return [preprocessor.sat(filtered, generator) for _ in range(preprocessor.views)]
