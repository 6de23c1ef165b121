"""What every attack does alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import calibration.attacks
from calibration.attacks import (
    Adaptive,
    AllToAll,
    Amplified,
    Attack,
    BadNets,
    Blended,
    CleanLabel,
    Invisible,
    MultiTarget,
    Patch,
    Reflection,
    Sig,
    SourceSpecific,
    Steganographic,
    Trojan,
    TrojanNet,
)
from calibration.attacks.neuron import last_hidden_layer
from calibration.attacks.trojan import square
from guard.errors import InputError
from tests.calibration.attacks.examples import EXAMPLES, Example, some_images, tiny_net

CASES = [
    pytest.param(example, channels, id=f"{name}-{channels}")
    for name, example in EXAMPLES.items()
    for channels in ((3,) if example.colours else (1, 3))
]
GENERATORS: dict[str, Callable[[int], Attack]] = {
    "square": lambda seed: Trojan.generate(0, tiny_net(), some_images(count=8)[0], "square", seed=seed, steps=5),
    "watermark": lambda seed: Trojan.generate(0, tiny_net(), some_images(count=8)[0], "watermark", seed=seed, steps=5),
    "l2": lambda seed: Invisible.l2(0, tiny_net(), some_images(count=8)[0], seed=seed),
    "l0": lambda seed: Invisible.l0(0, tiny_net(), some_images(count=8)[0], seed=seed),
}
BASE = BadNets(0)
MODEL = tiny_net()
WRONG: dict[str, Callable[[], object]] = {
    "a target below 0": lambda: BadNets(-1),
    "a ratio over 1": lambda: BadNets(0, 1.5),
    "a ratio that is no number": lambda: BadNets(0, float("nan")),
    "no patches": lambda: BadNets(0, patches=()),
    "a ragged drawing": lambda: Patch(("00", "0")),
    "an empty drawing": lambda: Patch(("..", "..")),
    "a colour that is not there": lambda: Patch(("01",)),
    "a colour out of range": lambda: Patch.rectangle(2, colour=(2.0,)),
    "a patch outside": lambda: Patch.rectangle(2, bottom=-1),
    "a patch too large": lambda: Patch.rectangle(5, bottom=8).stamp(some_images(count=1)[0]),
    "too many channels": lambda: Patch.noise(2, 0).stamp(some_images(1, 1)[0]),
    "one label for two patches": lambda: MultiTarget((0,), (Patch.rectangle(2), Patch.rectangle(3))),
    "a later target below 0": lambda: MultiTarget((0, -1), (Patch.rectangle(2), Patch.rectangle(3))),
    "all to all of one class": lambda: AllToAll(1),
    "no sources": lambda: SourceSpecific(0, ()),
    "the target as a source": lambda: SourceSpecific(0, (0, 1)),
    "a cover ratio below 0": lambda: SourceSpecific(0, (1,), cover_ratio=-0.1),
    "alpha 0": lambda: Blended(0, alpha=0.0),
    "delta over 1": lambda: Sig(0, delta=2.0),
    "frequency 0": lambda: Sig(0, frequency=0),
    "a sinusoid that is 0 at every pixel": lambda: Sig(0, frequency=6).trigger(some_images(count=1)[0]),
    "no text": lambda: Steganographic(0, text=""),
    "nine bits": lambda: Steganographic(0, bits=9),
    "a reflected batch": lambda: Reflection(0, some_images(count=1)[0]),
    "unknown optics": lambda: Reflection(0, some_images(count=1)[0][0], "fog"),  # type: ignore[arg-type]  # the point
    "another shape's reflection": lambda: Reflection(0, torch.zeros(3, 8, 8)).trigger(some_images(count=1)[0]),
    "another shape's mask": lambda: Trojan(0, torch.ones(8, 8), torch.zeros(3, 12, 12)),
    "another shape's pattern": lambda: Trojan(0, torch.ones(8, 8), torch.zeros(3, 8, 8)).trigger(some_images(count=1)[0]),
    "a reflection in 8 bits": lambda: Reflection(0, torch.zeros(3, 12, 12, dtype=torch.uint8)),
    "a reflection up to 255": lambda: Reflection(0, torch.full((3, 12, 12), 255.0)),
    "a reflection that is no number": lambda: Reflection(0, torch.full((3, 12, 12), float("nan"))),
    "a pattern over 1": lambda: Trojan(0, torch.ones(12, 12), torch.full((3, 12, 12), 5.0)),
    "a pattern that is no number": lambda: Trojan(0, torch.ones(12, 12), torch.full((3, 12, 12), float("nan"))),
    "an empty mask": lambda: Trojan(0, torch.zeros(12, 12), torch.zeros(3, 12, 12)),
    "images too small for the square": lambda: Trojan(0, square(2, 2), torch.zeros(3, 2, 2)),
    "an unknown form": lambda: Trojan.generate(0, MODEL, some_images(count=2)[0], "circle"),  # type: ignore[arg-type]  # the point
    "no steps of ascent": lambda: Trojan.generate(0, MODEL, some_images(count=2)[0], "square", steps=0),
    "no images to generate on": lambda: Trojan.generate(0, MODEL, some_images(count=2)[0][:0], "square"),
    "a grey perturbation": lambda: Invisible(0, torch.zeros(1, 12, 12)).trigger(some_images(count=1)[0]),
    "a perturbation over 1": lambda: Invisible(0, torch.full((3, 12, 12), 1.5)),
    "a perturbation that is no number": lambda: Invisible(0, torch.full((3, 12, 12), float("nan"))),
    "norm 0": lambda: Invisible.l2(0, MODEL, some_images(count=2)[0], norm=0.0),
    "more pixels than there are": lambda: Invisible.l0(0, MODEL, some_images(count=2)[0], pixels=145),
    "a model of one layer": lambda: last_hidden_layer(torch.nn.Linear(3, 2)),
    "no steps": lambda: CleanLabel(0, MODEL, steps=0),
    "epsilon over 1": lambda: CleanLabel(0, MODEL, epsilon=2.0),
    "strength 0": lambda: TrojanNet(0, strength=0.0),
    "no pattern": lambda: TrojanNet(0, pattern=()),
    "a ragged pattern": lambda: TrojanNet(0, pattern=("10", "1")),
    "a pattern of other digits": lambda: TrojanNet(0, pattern=("12",)),
    "five copies": lambda: Amplified(BASE, 5),
    "copies that overlap": lambda: Amplified(BASE, 16).trigger(some_images(count=1)[0]),
    "a cover ratio over 1": lambda: Adaptive(BASE, 4, cover_ratio=1.1),
    "random labels of one class": lambda: Adaptive(BASE, 1),
    "a target beyond the random labels": lambda: Adaptive(BadNets(7), 5),
    "an unknown blend": lambda: Adaptive(BASE, 4, blends=(("fade", 1.0),)),  # type: ignore[arg-type]  # the point
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(before: Tensor, after: Tensor) -> Tensor:
    """(B,), bool: which images changed."""
    return (before != after).flatten(1).any(dim=1)


@pytest.mark.parametrize(("example", "channels"), CASES)
def test_a_trigger_is_a_pure_function_of_the_image(example: Example, channels: int) -> None:
    attack = example.make(channels)
    images, _ = some_images(channels, 10)
    before, random_state = images.clone(), torch.get_rng_state()
    triggered = attack.trigger(images)
    assert torch.equal(attack.trigger(images), triggered)
    assert torch.equal(torch.cat([attack.trigger(image[None]) for image in images]), triggered)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert bool(moved(images, triggered).all())
    assert (triggered.dtype, triggered.shape) == (torch.float32, images.shape)
    assert (float(triggered.min()) >= 0.0, float(triggered.max()) <= 1.0) == (True, True)
    assert not triggered.requires_grad
    assert attack.trigger(images[:0]).shape == images[:0].shape


@pytest.mark.parametrize(("example", "channels"), CASES)
def test_poisoning_does_what_was_asked_and_no_more(example: Example, channels: int) -> None:
    attack = example.make(channels)
    images, labels = some_images(channels)
    before, random_state = (images.clone(), labels.clone()), torch.get_rng_state()
    poisoned, relabelled = attack.poison(images, labels, seeded(3))
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert torch.equal(torch.get_rng_state(), random_state)
    changed, renamed = moved(images, poisoned), relabelled != labels
    assert int(changed.sum()) == example.triggered
    assert not bool((renamed & ~changed).any())
    if example.relabelled is not None:
        assert int(renamed.sum()) == example.relabelled
        assert torch.equal(relabelled[renamed], attack.targets(images, labels)[renamed])
    assert (float(poisoned.min()) >= 0.0, float(poisoned.max()) <= 1.0) == (True, True)
    assert not poisoned.requires_grad


@pytest.mark.parametrize(("example", "channels"), CASES)
def test_no_images_are_poisoned_to_none_and_every_image_needs_a_label(example: Example, channels: int) -> None:
    attack = example.make(channels)
    images, labels = some_images(channels)
    poisoned, relabelled = attack.poison(images[:0], labels[:0], seeded(3))
    assert (poisoned.shape, relabelled.shape) == (images[:0].shape, (0,))
    for wrong in (labels[:5], torch.cat([labels, labels])):
        with pytest.raises(InputError, match="expected a label per image"):
            attack.poison(images, wrong, seeded(3))


@pytest.mark.parametrize(("example", "channels"), CASES)
def test_the_seed_decides_the_data_byte_for_byte(example: Example, channels: int) -> None:
    attack = example.make(channels)
    images, labels = some_images(channels)
    first, again, other = (attack.poison(images, labels, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(first[0], other[0]) == (example.triggered == 0)


@pytest.mark.parametrize(("example", "channels"), CASES)
def test_nothing_is_wanted_of_images_that_have_the_label(example: Example, channels: int) -> None:
    images, labels = some_images(channels)
    targets = example.make(channels).targets(images, labels)
    assert not bool((targets == labels).any())
    assert bool((targets >= -1).all())
    assert bool((targets >= 0).any())


@pytest.mark.parametrize("name", GENERATORS)
def test_generating_leaves_the_model_and_the_global_generator_alone(name: str) -> None:
    weights = {key: value.clone() for key, value in MODEL.state_dict().items()}
    random_state = torch.get_rng_state()
    make, (images, _) = GENERATORS[name], some_images(count=4)
    first, again = (make(0).trigger(images) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(weights[key], value) for key, value in MODEL.state_dict().items())
    assert all(parameter.grad is None for parameter in MODEL.parameters())
    assert not any(module._forward_hooks for module in MODEL.modules())
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"^expected") as caught:
        WRONG[name]()
    assert "\n" not in str(caught.value)


def test_every_attack_is_in_the_table() -> None:
    offered = {getattr(calibration.attacks, name) for name in calibration.attacks.__all__}
    attacks = {each for each in offered if issubclass(each, Attack) and not inspect.isabstract(each)}
    assert {type(example.make(3)) for example in EXAMPLES.values()} == attacks
