"""The CycleGAN: unpaired images, a trigger on one side, and what both generators make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibration.checkpoints import Checkpoints
from calibration.engine import Engine
from calibration.repair.cyclegan import Critics, CycleGan, Generator, Training, apply, discriminator, train, with_coordinates

QUICK = Training(epochs=8, width=12, blocks=1, batch=10, rate=1e-3)


def grey(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 0.6


def stamped(images: Tensor) -> Tensor:
    """A white square, neither in a corner nor in the middle: without coordinates a convolution could not find its place."""
    out = images.clone()
    out[:, :, 2:4, 4:6] = 1.0
    return out


def weights(gan: CycleGan) -> list[Tensor]:
    return [value for module in (gan.put_on, gan.take_off) for value in module.state_dict().values()]


@pytest.mark.slow
def test_it_puts_the_trigger_on_and_takes_it_off(engine: Engine) -> None:
    training = Training(epochs=24, width=12, blocks=1, batch=10, rate=1e-3)
    gan = train(grey(100, 0), stamped(grey(100, 1)), training, engine, seed=0)
    clean = grey(50, 2)
    triggered = apply(gan.put_on, clean)
    assert float(triggered[:, 0, 2:4, 4:6].mean()) > 0.9
    changed = (triggered - clean).abs()
    changed[:, :, 2:4, 4:6] = 0.0
    assert float(changed.mean()) < 0.05
    cleaned = apply(gan.take_off, stamped(clean))
    assert float(cleaned[:, 0, 2:4, 4:6].mean()) < 0.6


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 33, 47), (3, 224, 224)])
def test_generators_begin_as_the_identity_and_keep_the_shape(shape: tuple[int, int, int]) -> None:
    images = torch.rand(2, *shape)
    gan = CycleGan.untrained(shape, QUICK)
    torch.testing.assert_close(apply(gan.put_on, images), images)
    larger = max(shape[1:]) > 64
    assert sum(part.stride == (2, 2) for part in gan.put_on.modules() if isinstance(part, torch.nn.Conv2d)) == 1 + larger
    critics = Critics(shape, 8)
    opinions = critics.of_x(with_coordinates(images))
    assert opinions.shape[:2] == (2, 1)
    assert opinions.shape[-1] > 1


def test_coordinates_tell_places_apart() -> None:
    same = torch.zeros(1, 1, 16, 16)
    opinions = discriminator(1, 8)(with_coordinates(same))[0, 0].detach()
    assert float((opinions[1, 1] - opinions[2, 2]).abs()) > 1e-6
    assert with_coordinates(same)[0, 1, 0].tolist() == pytest.approx(torch.linspace(-1, 1, 16).tolist())
    assert with_coordinates(same)[0, 2, :, 0].tolist() == pytest.approx(torch.linspace(-1, 1, 16).tolist())


def test_it_stops_early_when_the_generators_are_good_enough(engine: Engine) -> None:
    shown: list[tuple[int, int]] = []
    training = Training(epochs=40, width=8, blocks=1)
    train(grey(20, 0), stamped(grey(20, 1)), training, engine, 0, lambda _: True, progress=lambda _, *step: shown.append(step))
    assert shown[-1] == (10, 10)  # looked at after five epochs, then as many again
    assert shown[3] == (4, 40)


def test_the_same_seed_gives_the_same_generators_and_leaves_the_global_one_alone(engine: Engine) -> None:
    state = torch.get_rng_state()
    first, again = (weights(train(grey(20, 0), stamped(grey(30, 1)), QUICK, engine, seed=3)) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(engine: Engine, tmp_path: Path) -> None:
    x, y = grey(20, 0), stamped(grey(30, 1))
    whole = weights(train(x, y, QUICK, engine, seed=3))

    def interrupt(_: str, done: int, __: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path / "checkpoint", "work")
    with pytest.raises(KeyboardInterrupt):
        train(x, y, QUICK, engine, 3, checkpoints=checkpoints, progress=interrupt)
    epochs: list[int] = []
    resumed = train(x, y, QUICK, engine, 3, checkpoints=checkpoints, progress=lambda _, done, __: epochs.append(done))
    assert epochs == [4, 5, 6, 7, 8]
    for found, expected in zip(weights(resumed), whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_generators_answer_alike_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    generator = Generator(1, 8, 1)
    torch.nn.init.normal_(generator.last.weight)
    images = grey(70, 0)
    torch.testing.assert_close(
        torch.cat([apply(generator, image[None]) for image in images]), apply(generator, images), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_no_more_epochs_are_learnt_than_were_asked_for(engine: Engine, epochs: int) -> None:
    shown: list[tuple[int, int]] = []
    training = Training(epochs=epochs, width=4, blocks=1, batch=10)
    train(grey(10, 0), stamped(grey(10, 1)), training, engine, 0, progress=lambda _, *step: shown.append(step))
    assert shown[-1] == (epochs, epochs)
