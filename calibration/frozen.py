"""A model whose input gets gradients and whose weights get none: what searches for triggers look through."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from calibration.fine_tuning import Answers, TrainableCopy, trainable
from guard.errors import ModelError, one_line
from guard.predictors import Predictor
from guard.predictors.exported import ExportedBackend
from guard.predictors.module import ModuleBackend

_ALIKE = 1e-3  # of probabilities
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)


def frozen(predictor: Predictor, images: Tensor) -> Answers:
    """A copy of a predictor's model as a function, as fast as it can be had; the model itself stays as it is.

    Batch norms are folded into the convolutions before them, which a third of the time goes into otherwise, where the model can
    be traced, or is a program, and answers as before.

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
    before = copied.predictor
    try:
        if isinstance(before.backend, ModuleBackend):
            folded = dataclasses.replace(before, backend=ModuleBackend(_fold(before.backend.module)))
        elif isinstance(before.backend, ExportedBackend):
            folded = TrainableCopy.of(before).predictor  # a program changes in place, and the two are compared
            _fold_program(trainable(folded.backend))
        else:
            return copied
        same = all(_alike(folded, before, some) for some in (images, images[:1]))
    except ModelError:
        return copied
    for parameter in trainable(folded.backend).parameters():
        parameter.requires_grad_(False)
    return TrainableCopy(folded, []) if same else copied


def _fold(module: nn.Module) -> nn.Module:
    """Of a module that can be traced."""
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
    return traced


def _fold_program(program: nn.Module) -> None:
    """In place, of what `torch.export` made, whose weights are nodes of the graph."""
    if not isinstance(program, fx.GraphModule):
        return
    read = Counter(node.target for node in program.graph.nodes if node.op == "get_attr")
    try:
        for norm in list(program.graph.nodes):
            if norm.target is not torch.ops.aten.batch_norm.default or norm.args[5]:  # which is True in training
                continue
            convolution = norm.args[0]
            weight = convolution.args[1] if convolution.target in _CONVOLUTIONS and len(convolution.users) == 1 else None
            if weight is None or weight.op != "get_attr" or read[weight.target] != 1 or len(weight.users) != 1:
                continue
            _into(program, convolution, weight, norm)
        program.graph.eliminate_dead_code()
        program.recompile()
    except Exception as error:  # a program may be of another making
        raise ModelError(f"the program can't be changed: {one_line(error)}") from error


def _into(program: fx.GraphModule, convolution: fx.Node, weight: fx.Node, norm: fx.Node) -> None:
    """Fold one batch norm into the convolution before it."""

    def value(node: object) -> Any:
        return operator.attrgetter(str(node.target))(program) if isinstance(node, fx.Node) else None

    arguments = [*convolution.args, None][:3]
    scale, shift, mean, variance = (value(node) for node in norm.args[1:5])
    own = program.get_parameter(str(weight.target))  # nothing else is replaced
    kernel, bias = fuse_conv_bn_weights(own, value(arguments[2]), mean, variance, cast(float, norm.args[7]), scale, shift)
    folder, _, name = str(weight.target).rpartition(".")
    setattr(program.get_submodule(folder), name, kernel)
    program.register_parameter(f"_folded_{convolution.name}", bias)
    with program.graph.inserting_before(convolution):
        shifted = program.graph.get_attr(f"_folded_{convolution.name}")
    convolution.args = (*convolution.args[:2], shifted, *convolution.args[3:])
    norm.replace_all_uses_with(convolution)
    program.graph.erase_node(norm)


def _alike(one: Predictor, other: Predictor, images: Tensor) -> bool:
    return bool(torch.isclose(one(images), other(images), atol=_ALIKE, equal_nan=True).all())
