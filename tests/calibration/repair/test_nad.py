"""Neural attention distillation: what an attention map is, where maps are taken from, and what the student learns by them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from calibration.engine import Engine
from calibration.fine_tuning import TrainableCopy, trainable
from calibration.repair.cases import Parts, clean_parts
from calibration.repair.nad import BRISK, FeatureMaps, Nad, attention, attention_loss, repair_by_nad
from calibration.repair.plain_fine_tuning import OURS, FineTuning
from calibration.repair.tuning import Lesson
from cli.demonstration.digits import Digits, save_exported
from guard import Predictor
from guard.errors import ModelError, RepairError
from guard.predictors.exported import ExportedBackend
from guard.predictors.torchscript import TorchScriptBackend
from tests.calibration.repair.channels import accuracy, digit_predictor, success
from tests.calibration.repair.conftest import SPEC
from tests.guard.models import save_torchscript

ROUNDED = 0.01  # the teacher runs in half precision where that is fast
QUICK = FineTuning(tuning=msgspec.structs.replace(OURS, epochs=8))


@pytest.fixture(scope="module")
def original(backdoored: nn.Module) -> Predictor:
    return digit_predictor(backdoored)


@pytest.fixture(scope="module")
def parts(digits: Digits, original: Predictor) -> Parts:
    return clean_parts(digits.clean, original, 0)


def test_attention_by_hand() -> None:
    maps = torch.tensor([[[[1.0, 0.0]], [[-1.0, 2.0]]]])  # two channels of two pixels
    torch.testing.assert_close(attention(maps, 2.0), torch.tensor([[2.0, 4.0]]) / 20.0**0.5)
    torch.testing.assert_close(attention(maps, 1.0), torch.tensor([[2.0, 2.0]]) / 8.0**0.5)
    assert not bool(attention(torch.zeros(1, 2, 1, 2), 2.0).any())  # nothing is seen anywhere


def test_maps_are_the_last_of_each_size(backdoored: nn.Sequential, digits: Digits, tmp_path: Path) -> None:
    images = digits.test.images(slice(0, 4))
    with torch.no_grad():
        small = backdoored[:8](images)  # both convolutions before the pooling, and the one after it, with what follows them
        large = backdoored[:4](images)
        with FeatureMaps() as eager:
            backdoored(images)
        save_exported(backdoored, images, tmp_path / "model.pt2")
        with FeatureMaps() as exported:
            ExportedBackend.load(tmp_path / "model.pt2")(images)
    for found in (eager.last, exported.last):
        assert list(found) == [(8, 8), (4, 4)]
        torch.testing.assert_close(found[8, 8], large)
        torch.testing.assert_close(found[4, 4], small)


class Block(nn.Module):
    """A convolution beside a shortcut, and its mean for an answer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(1, 2, 3, padding=1)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.convolution(images)
        out += images
        return nn.functional.relu(out, inplace=True).mean(dim=(2, 3))


def test_a_block_s_map_is_what_comes_out_of_it() -> None:
    block, images = Block(), torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with FeatureMaps() as found:
        answers = block(images)
    assert list(found.last) == [(4, 4)]
    torch.testing.assert_close(found.last[4, 4].mean(dim=(2, 3)), answers)


def test_the_loss_by_hand(engine: Engine) -> None:
    student, teacher = Block(), Block()
    images, labels = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1])
    lesson, tuning = Lesson(images, torch.zeros(3, 2), labels), QUICK.tuning
    task = nn.functional.cross_entropy(student(images), labels)
    same = attention_loss(teacher, tuning, 1000.0, 2.0, engine)
    torch.testing.assert_close(same(student, lesson), task, rtol=ROUNDED, atol=ROUNDED)
    with torch.no_grad():
        teacher.convolution.weight.neg_()
    maps = [(block.convolution(images) + images).relu().square().sum(dim=1).flatten(1) for block in (student, teacher)]
    own, wanted = (nn.functional.normalize(part, dim=1) for part in maps)
    loss = attention_loss(teacher, tuning, 10.0, 2.0, engine)(student, lesson)
    torch.testing.assert_close(loss, task + 10.0 * (own - wanted).square().sum() / 48.0, rtol=ROUNDED, atol=ROUNDED)
    loss.backward()
    assert teacher.convolution.weight.grad is None


def test_the_trigger_goes_and_accuracy_stays(original: Predictor, parts: Parts, digits: Digits, engine: Engine) -> None:
    before, known, told = original.backend.fingerprint(), torch.get_rng_state(), set()
    copied = TrainableCopy.of(original)
    repair_by_nad(copied, original, parts, Nad(teacher=QUICK), engine, 0, progress=lambda what, _, __: told.add(what))
    assert success(original, digits) == 1.0
    assert success(copied.predictor, digits) <= 0.2
    assert accuracy(copied.predictor, digits) >= accuracy(original, digits) - 0.06
    assert told == {"fine-tuning the teacher", "fine-tuning"}
    assert original.backend.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), known)


def test_the_rate_is_high_where_batch_norm_bears_it() -> None:
    plain, normed = nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    settings = Nad(teacher=QUICK)
    assert settings.student_of(plain) == QUICK
    assert settings.student_of(normed).tuning == msgspec.structs.replace(BRISK, epochs=8)
    assert Nad(student=QUICK).student_of(normed) == QUICK


def test_what_can_not_be_looked_into_is_refused(original: Predictor, parts: Parts, engine: Engine, tmp_path: Path) -> None:
    save_torchscript(trainable(original.backend), tmp_path / "model.pt")
    scripted = Predictor(TorchScriptBackend.load(tmp_path / "model.pt"), SPEC, 10, "logits")
    with pytest.raises(ModelError, match="expected a model with convolutions that can be watched"):
        repair_by_nad(TrainableCopy.of(scripted), scripted, parts, Nad(), engine, 0)
    with pytest.raises(RepairError, match="expected a beta of 0 or more"):
        Nad(beta=-1.0)
