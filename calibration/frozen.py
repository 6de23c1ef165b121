"""A model whose input gets gradients and whose weights get none: what searches for triggers look through."""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from calibration.fine_tuning import Answers, TrainableCopy
from guard.errors import ModelError, one_line
from guard.predictors import Predictor
from guard.predictors.module import ModuleBackend

_ALIKE = 1e-3  # of probabilities


def frozen(predictor: Predictor, images: Tensor) -> Answers:
    """A copy of a predictor's model as a function, as fast as it can be had; the model itself stays as it is.

    Batch norms are folded into the convolutions before them, which a third of the time goes into otherwise, where the model can
    be traced and answers as before.

    Args:
        predictor: Of the model.
        images: (B, C, H, W), in [0, 1], a few to try the copy on.

    Returns:
        Images to logits.

    Raises:
        ModelError: The model is none that gradients can pass through.
    """
    copied = TrainableCopy.of(predictor)
    for parameter in copied.parameters:
        parameter.requires_grad_(False)
    return _folded(copied, images).faster(images).answers()


def _folded(copied: TrainableCopy, images: Tensor) -> TrainableCopy:
    backend = copied.predictor.backend
    if not isinstance(backend, ModuleBackend):
        return copied
    try:
        folded = dataclasses.replace(copied.predictor, backend=ModuleBackend(_fold(backend.module)))
        same = all(_alike(folded, copied.predictor, some) for some in (images, images[:1]))
    except ModelError:
        same = False
    return TrainableCopy(folded, []) if same else copied


def _fold(module: nn.Module) -> nn.Module:
    try:
        traced = fx.symbolic_trace(module).eval()
        calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
        for node in traced.graph.nodes:
            before, convolution, norm = node.args[0] if node.args else None, None, None
            if isinstance(before, fx.Node) and calls[before.target] == calls[node.target] == 1 and len(before.users) == 1:
                convolution, norm = (traced.get_submodule(str(part.target)) for part in (before, node))
            if isinstance(before, fx.Node) and isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                traced.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
                node.replace_all_uses_with(before)
                traced.graph.erase_node(node)
        traced.delete_all_unused_submodules()
        traced.recompile()
    except Exception as error:  # foreign code, which need not bear being traced
        raise ModelError(f"the model can't be traced: {one_line(error)}") from error
    for parameter in traced.parameters():
        parameter.requires_grad_(False)
    return traced


def _alike(one: Predictor, other: Predictor, images: Tensor) -> bool:
    return bool(torch.isclose(one(images), other(images), atol=_ALIKE, equal_nan=True).all())
