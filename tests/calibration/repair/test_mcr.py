"""Mode connectivity repair: a curve's points by hand, on models of each kind, and which one is taken."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy
from calibration.repair.cases import clean_parts
from calibration.repair.mcr import PAPER, Curve, Mcr, preferred, repair_by_mcr
from calibration.repair.plain_fine_tuning import OURS, FineTuning
from cli.demonstration.digits import Digits, save_exported
from guard import Predictor
from guard.errors import RepairError
from guard.predictors import wrap
from guard.predictors.exported import ExportedBackend
from guard.predictors.torchscript import TorchScriptBackend
from tests.calibration.repair.channels import accuracy, digit_predictor, success
from tests.guard.models import save_torchscript
from tests.toy import SPEC as TOY

QUICK = FineTuning(tuning=msgspec.structs.replace(OURS, epochs=7))
IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def normed(seed: int) -> nn.Sequential:
    """A small net with batch norm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
        statistics = net[1].running_mean
        assert isinstance(statistics, Tensor)
        statistics.normal_()
    return net.eval()


def curve_between(start: nn.Module, end: nn.Module) -> tuple[Curve, TrainableCopy]:
    copies = [TrainableCopy.of(Predictor(wrap(net), TOY, 4, "logits")) for net in (start, end)]
    return Curve.between(copies[0], *copies)


def test_a_curve_ends_in_its_models_and_begins_as_a_straight_line() -> None:
    start, end = normed(0), normed(1)
    curve, moving = curve_between(start, end)
    for point, net in ((0.0, start), (1.0, end)):
        curve.point = point
        assert torch.equal(moving.predictor(IMAGES), net(IMAGES).softmax(dim=1))
    for name in ("0.weight", "1.running_mean", "4.bias"):
        first, last = (net.state_dict()[name] for net in (start, end))
        torch.testing.assert_close(curve.weights(0.25)[name], 0.75 * first + 0.25 * last)


def test_points_of_a_bent_curve_by_hand() -> None:
    start, end = normed(0), normed(1)
    curve, moving = curve_between(start, end)
    with torch.no_grad():
        for parameter in moving.parameters:
            parameter.fill_(2.0)
    first, last = (net.state_dict()["4.weight"] for net in (start, end))
    found = curve.weights(0.2)["4.weight"]
    torch.testing.assert_close(found, 0.64 * first + 0.32 * torch.full_like(found, 2.0) + 0.04 * last)
    found.sum().backward()
    bend = dict(curve.bend.named_parameters())["4.weight"]
    torch.testing.assert_close(bend.grad, torch.full_like(bend, 0.32))


@pytest.mark.parametrize("kind", ["torchscript", "torch-export"])
def test_other_kinds_of_model_follow_the_same_curve(kind: str, tmp_path: Path) -> None:
    nets, copies = (normed(0), normed(1)), []
    for number, net in enumerate(nets):
        path = tmp_path / f"{number}"
        if kind == "torchscript":
            save_torchscript(net, path)
            backend: TorchScriptBackend | ExportedBackend = TorchScriptBackend.load(path)
        else:
            save_exported(net, IMAGES, path.with_suffix(".pt2"))
            backend = ExportedBackend.load(path.with_suffix(".pt2"))
        copies.append(TrainableCopy.of(Predictor(backend, TOY, 4, "logits")))
    curve, moving = Curve.between(copies[0], *copies)
    eager, plain = curve_between(*nets)
    for curve.point in (0.0, 0.3, 1.0):
        eager.point = curve.point
        torch.testing.assert_close(moving.predictor(IMAGES), plain.predictor(IMAGES))
    curve.point = eager.point = 0.4
    for copied in (moving, plain):
        copied.loss(IMAGES, torch.tensor([0, 1, 2, 3, 0])).backward()
    gradients = [{name: value.grad for name, value in part.bend.named_parameters()} for part in (curve, eager)]
    torch.testing.assert_close(*gradients)


def test_the_point_nearest_to_the_middle_is_taken_of_those_that_are_good_enough() -> None:
    found = [(0.1, 0.90), (0.3, 0.97), (0.5, 0.96), (0.7, 0.97), (0.9, 0.98)]
    assert preferred(found, 3.0) == 0.5
    assert preferred(found, 2.0) == 0.5
    assert preferred(found, 1.0) == 0.7
    assert preferred(found, 0.0) == 0.9
    assert preferred([(0.4, 0.9), (0.6, 0.9)], 0.0) == 0.6


@pytest.mark.parametrize("both_tuned", [False, True])
def test_the_trigger_goes_and_accuracy_stays(backdoored: nn.Module, digits: Digits, engine: Engine, both_tuned: bool) -> None:
    original = digit_predictor(backdoored)
    parts, copied = clean_parts(digits.clean, original, 0), TrainableCopy.of(original)
    before, known, told = original.backend.fingerprint(), torch.get_rng_state(), set()
    connected = repair_by_mcr(
        copied,
        original,
        parts,
        Mcr(end=QUICK, bend=QUICK, both_tuned=both_tuned),
        engine,
        0,
        progress=lambda what, _, __: told.add(what),
    )
    assert success(original, digits) == 1.0
    assert success(copied.predictor, digits) <= 0.2
    assert accuracy(copied.predictor, digits) >= accuracy(original, digits) - 0.06
    assert connected.point == preferred(connected.accuracies, 1.0)
    ends = {f"fine-tuning end {number} of the curve" for number in ((1, 2) if both_tuned else (2,))}
    assert told == {*ends, "training the curve"}
    assert original.backend.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), known)


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(RepairError, match="expected points from 0 to 1"):
        Mcr(points=(0.5, 1.5))
    with pytest.raises(RepairError, match="expected points from 0 to 1"):
        Mcr(points=())
    with pytest.raises(RepairError, match="expected a bend with fixed batch norm statistics"):
        Mcr(bend=FineTuning(tuning=msgspec.structs.replace(PAPER, batch_statistics=True)))
