"""Frozen copies: the model's answers and its input's gradients, no others, and whatever can't be traced stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibration.fine_tuning import Answers, TrainableCopy, trainable
from calibration.frozen import frozen
from guard.images import InputSpec
from guard.predictors import Predictor, wrap
from guard.predictors.exported import ExportedBackend
from guard.predictors.torchscript import TorchScriptBackend

SPEC = InputSpec(channels=3, height=8, width=8)
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _net() -> nn.Sequential:
    """With statistics that make a difference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
        norm = net[1]
        assert isinstance(norm, nn.BatchNorm2d)
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            assert value is not None
            nn.init.uniform_(value, 0.5, 2.0)
    return net.eval()


class Branching(nn.Module):
    """Looks at its input's values, which tracing can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _net()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.net(images if float(images.detach().max()) <= 1.0 else images / 255.0)
        return answers


class SharedConvolution(nn.Module):
    """One convolution before two batch norms: folding both would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.convolution = nn.Conv2d(3, 3, 3, padding=1)
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.last = nn.Linear(192, 5)
        for norm in (self.first, self.second):
            assert norm.running_var is not None
            nn.init.constant_(norm.running_var, 0.05)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.last(self.second(self.convolution(self.first(self.convolution(images)))).flatten(1))
        return answers


class Unbiased(nn.Module):
    """Strings for padding, no bias, and a batch norm that only shifts."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.net = nn.Sequential(
                nn.Conv2d(3, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(256, 5)
            )
        norm = self.net[1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        nn.init.uniform_(norm.running_mean, 0.5, 2.0)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.net(images)
        return answers


def _program(model: nn.Module, path: Path, batch: int | None = None) -> Predictor:
    """It, exported; for one size of batch, or for any."""
    free = ({0: torch.export.Dim("batch", min=1)},) if batch is None else None
    torch.export.save(torch.export.export(model, (IMAGES[: batch or 2],), dynamic_shapes=free), path)
    return Predictor(ExportedBackend.load(path), SPEC, 5, "logits")


def _gradient(answers: nn.Module) -> Tensor:
    images = IMAGES.clone().requires_grad_(True)
    answers(images).square().sum().backward()
    assert images.grad is not None
    return images.grad


def _norms_left(answers: Answers) -> int:
    """In a program."""
    assert isinstance(answers.module, torch.fx.GraphModule)
    return sum("batch_norm" in str(node.target) for node in answers.module.graph.nodes if node.op == "call_function")


def _norms(answers: Answers) -> Iterator[nn.Module]:
    return (module for module in answers.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize("model", [_net(), Branching(), SharedConvolution()], ids=["folded", "branching", "shared"])
def test_answers_and_gradients_are_the_models(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    predictor = Predictor(wrap(model), SPEC, 5, "logits")
    plain, found = TrainableCopy.of(predictor).answers(), frozen(predictor, IMAGES[:2])
    with torch.inference_mode():
        torch.testing.assert_close(found(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_gradient(found), _gradient(plain), rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in found.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norms_are_folded_where_that_can_be_done() -> None:
    assert not list(_norms(frozen(Predictor(wrap(_net()), SPEC, 5, "logits"), IMAGES[:2])))
    assert list(_norms(frozen(Predictor(wrap(Branching()), SPEC, 5, "logits"), IMAGES[:2])))
    assert list(_norms(frozen(Predictor(wrap(SharedConvolution()), SPEC, 5, "logits"), IMAGES[:2])))


@pytest.mark.parametrize(
    ("model", "batch", "left"),
    [(_net(), None, 0), (_net(), 3, 0), (Unbiased(), None, 0), (SharedConvolution(), None, 2)],
    ids=["folded", "fixed batch", "unbiased", "shared"],
)
def test_programs_are_folded_too(model: nn.Module, batch: int | None, left: int, tmp_path: Path) -> None:
    predictor = _program(model, tmp_path / "model.pt2", batch)
    plain, found = TrainableCopy.of(predictor).answers(), frozen(predictor, IMAGES[:2])
    assert (_norms_left(plain), _norms_left(found)) == (max(left, 1), left)
    with torch.inference_mode():
        torch.testing.assert_close(found(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_gradient(found), _gradient(plain), rtol=1e-3, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in found.parameters())
    weights = next(parameter for parameter in found.parameters() if parameter.ndim == 4)
    assert weights.is_contiguous(memory_format=torch.channels_last)


def test_a_program_that_training_takes_faster_is_saved_as_it_came(tmp_path: Path) -> None:
    predictor = _program(_net(), tmp_path / "model.pt2")
    copied = TrainableCopy.of(predictor).faster(IMAGES[:2])
    weights = next(parameter for parameter in copied.parameters if parameter.ndim == 4)
    assert weights.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(copied.predictor(IMAGES), predictor(IMAGES))
    copied.settle()
    assert weights.is_contiguous()
    before, after = (trainable(item.backend).state_dict() for item in (predictor, copied.predictor))
    assert all(torch.equal(value, after[name]) and value.stride() == after[name].stride() for name, value in before.items())


class Grid(nn.Module):
    """With a buffer of five axes, which knows no channels last, and a convolution of groups before its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.convolution = nn.Conv2d(3, 6, 3, groups=3)
            self.norm, self.last = nn.BatchNorm2d(6), nn.Linear(216, 5)
            self.register_buffer("grid", torch.rand(1, 1, 6, 6, 6))
        assert self.norm.running_var is not None
        nn.init.constant_(self.norm.running_var, 0.05)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.last((self.norm(self.convolution(images)) + self.get_buffer("grid")[0]).flatten(1))
        return answers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["module", "exported", "script"])
def test_weights_of_other_axes_stay_as_they_are(kind: str, tmp_path: Path) -> None:
    if kind == "exported":
        predictor = _program(Grid(), tmp_path / "model.pt2")
    elif kind == "script":
        torch.jit.trace(Grid(), IMAGES).save(str(tmp_path / "model.pt"))
        predictor = Predictor(TorchScriptBackend.load(tmp_path / "model.pt"), SPEC, 5, "logits")
    else:
        predictor = Predictor(wrap(Grid()), SPEC, 5, "logits")
    found = frozen(predictor, IMAGES[:2])
    torch.testing.assert_close(found(IMAGES.clone().requires_grad_(True)), Grid()(IMAGES), rtol=1e-4, atol=1e-4)
