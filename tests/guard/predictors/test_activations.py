"""Activations against the same layers run by hand, in modules and in exported programs alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from guard.errors import ModelError
from guard.predictors import Predictor, load_backend, wrap
from guard.predictors.activations import Layer, Tap, activations, silence
from guard.predictors.exported import ExportedBackend
from tests.guard.models import predictor, save_exported, save_onnx, save_torchscript
from tests.toy import SIDE, SPEC, LearningToy, ToyNet

ROWS = 6
LAYERS: tuple[Layer, ...] = ("penultimate", "last_convolution", "features")


def pictures(count: int = ROWS, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A net whose weights and statistics all matter, from a generator of its own."""
    with torch.random.fork_rng(devices=[]):
        net = make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.dtype.is_floating_point:
                value.copy_(torch.rand(value.shape, generator=generator) - 0.3)
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d) and part.running_var is not None:
                part.running_var.abs_().add_(0.5)
    return net.eval()


class Net(nn.Module):
    """Layers are registered in another order than they are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 4)
        self.features = nn.Linear(6, 5)
        self.second, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.first = nn.Conv2d(1, 3, 3)
        self.relu = nn.ReLU(inplace=True)

    def convolved(self, images: Tensor) -> Tensor:
        return torch.relu(self.norm(self.second(torch.relu(self.first(images)))))

    def penultimate(self, images: Tensor) -> Tensor:
        return torch.relu(self.features(self.convolved(images).mean(dim=(2, 3))))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.norm(self.second(self.relu(self.first(images)))))
        answers: Tensor = self.head(nn.functional.relu(self.features(maps.mean(dim=(2, 3)))))
        return answers


class Residual(nn.Module):
    """Adds to its last convolution's output, and rectifies, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(2, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.convolution(images))
        maps += images
        pooled = torch.relu_(maps).mean(dim=(2, 3))
        answers: Tensor = self.head(pooled)
        pooled.zero_()
        return answers


class Product(nn.Module):
    """Its last linear layer is a matrix product; one of two pictures is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIDE * SIDE, 4))

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        answers = flat @ self.weight
        return answers + 0.0 * (flat @ flat.T).sum()


def net() -> Net:
    made = drawn(Net)
    assert isinstance(made, Net)
    return made


def everywhere(batch: int) -> nn.Module:
    """Convolutions alone, as in fully convolutional classifiers."""
    return drawn(
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.SiLU(), nn.Conv2d(3, batch, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )


def program(module: nn.Module, folder: Path, batch: int | None = None) -> nn.Module:
    """The module as the product loads it from a file."""
    backend = load_backend(save_exported(module, folder / "net.pt2", batch))
    assert isinstance(backend, ExportedBackend)
    assert isinstance(backend.run, nn.Module)
    return backend.run


def decomposed(module: nn.Module, folder: Path) -> nn.Module:
    """A program of core operators only: `addmm`, `convolution`, a batch norm that returns three tensors."""
    exported = torch.export.export(module, (pictures(),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export's own, about its own trees
        program: nn.Module = exported.run_decompositions().module()
    return program


def compiled(module: nn.Module, folder: Path) -> nn.Module:
    made = torch.compile(module, backend="eager")
    assert isinstance(made, nn.Module)
    return made


FORMS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "eager": lambda module, folder: module,
    "exported": program,
    "decomposed": decomposed,
    "compiled": compiled,
}


@pytest.mark.parametrize("form", FORMS)
def test_layers_equal_those_run_by_hand(form: str, tmp_path: Path) -> None:
    original = net()
    module = FORMS[form](original, tmp_path)
    images = pictures()
    state = {name: value.clone() for name, value in original.state_dict().items()}
    answers, found = Tap.of(module, "penultimate").run(images)
    torch.testing.assert_close(answers, original(images))
    torch.testing.assert_close(found, original.penultimate(images))
    answers, found = Tap.of(module, "last_convolution").run(images)
    torch.testing.assert_close(answers, original(images))
    torch.testing.assert_close(found, original.convolved(images))
    assert (found == 0).any()
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())


@pytest.mark.parametrize("form", ["eager", "exported", "decomposed"])
def test_what_is_written_over_later_is_kept(form: str, tmp_path: Path) -> None:
    original = drawn(Residual)
    assert isinstance(original, Residual)
    images = pictures()
    expected = original.norm(original.convolution(images))
    with torch.no_grad():
        module = FORMS[form](original, tmp_path)
        _, maps = Tap.of(module, "last_convolution").run(images)
        _, pooled = Tap.of(module, "penultimate").run(images)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(pooled, torch.relu(expected + images).mean(dim=(2, 3)))


@pytest.mark.parametrize("form", ["eager", "exported", "decomposed"])
def test_without_a_linear_layer_the_last_convolution_is_the_head(form: str, tmp_path: Path) -> None:
    original = everywhere(4)
    assert isinstance(original, nn.Sequential)
    images = pictures()
    expected = original[:2](images)
    _, found = Tap.of(FORMS[form](original, tmp_path), "penultimate").run(images)
    torch.testing.assert_close(found, expected.mean(dim=(2, 3)))


@pytest.mark.parametrize("form", ["eager", "exported", "decomposed"])
def test_products_with_weights_are_linear_layers_and_others_are_not(form: str, tmp_path: Path) -> None:
    images = pictures()
    _, found = Tap.of(FORMS[form](drawn(Product), tmp_path), "penultimate").run(images)
    assert torch.equal(found, images.flatten(1))


def test_an_activation_that_is_a_gate_is_no_part_of_the_convolution() -> None:
    module = drawn(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(72, 4)))
    assert isinstance(module, nn.Sequential)
    torch.testing.assert_close(Tap.of(module, "last_convolution").run(pictures())[1], module[0](pictures()))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", ["eager", "exported"])
def test_gradients_pass_through_both(form: str, layer: Layer, tmp_path: Path) -> None:
    module = FORMS[form](net(), tmp_path)
    images = pictures().requires_grad_(True)
    answers, found = Tap.of(module, layer).run(images)
    assert isinstance(answers, Tensor)
    for result in (answers, found):
        (gradient,) = torch.autograd.grad(result.sum(), images, retain_graph=True)
        assert gradient.abs().sum() > 0


class Moody(Net):
    """Refuses dark pictures, after its last layer."""

    def forward(self, images: Tensor) -> Tensor:
        answers = super().forward(images)
        if images.sum() == 0:
            raise ValueError("too dark")
        return answers


def test_nothing_is_left_behind_even_by_errors() -> None:
    module = drawn(Moody)
    assert isinstance(module, Moody)
    tap = Tap.of(module, "penultimate")
    with pytest.raises(ValueError, match="too dark"):
        tap.run(torch.zeros(2, 1, SIDE, SIDE))
    assert not torch.overrides._get_current_function_mode_stack()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    torch.testing.assert_close(tap.run(pictures())[1], module.penultimate(pictures()))
    with pytest.raises(ModelError, match="failed on a batch of 2: ValueError: too dark"):
        activations(predictor(module), torch.zeros(2, 1, SIDE, SIDE), "penultimate")


@pytest.mark.parametrize("form", ["eager", "exported"])
def test_threads_see_their_own_batches(form: str, tmp_path: Path) -> None:
    original = net()
    tap = Tap.of(FORMS[form](original, tmp_path), "last_convolution")
    batches = [pictures(seed=seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for images, (_, found) in zip(batches, pool.map(tap.run, batches), strict=True):
            torch.testing.assert_close(found, original.convolved(images))


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_predictors_normalise_and_cut_batches(layer: Layer, batch: int | None, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, mean=(0.5,), std=(0.25,))
    original = net()
    images = pictures(11)
    world = (images - 0.5) / 0.25
    maps = original.convolved(world)
    expected = {"penultimate": original.penultimate(world), "last_convolution": maps, "features": maps.mean(dim=(2, 3))}[layer]
    backends = [wrap(original), load_backend(save_exported(original, tmp_path / "net.pt2", batch))]
    for backend in backends:
        for memory in (2**30, 3 * SIDE * SIDE * 4 * 64):
            found = activations(Predictor(backend, spec, 4, "logits", memory), images, layer)
            torch.testing.assert_close(found, expected)
            assert not found.requires_grad


def test_models_that_cannot_be_looked_into(tmp_path: Path) -> None:
    for model in (save_torchscript(drawn(LearningToy), tmp_path / "toy.pt"), save_onnx(tmp_path / "toy.onnx")):
        with pytest.raises(ModelError, match=r"pass package.module:factory or a .pt2 file instead"):
            activations(Predictor(load_backend(model), SPEC, 4, "logits"), pictures(), "penultimate")
    with pytest.raises(ModelError, match="got one of kind callable"):
        activations(predictor(lambda batch: batch.flatten(1)[:, :4]), pictures(), "penultimate")
    scripted = load_backend(save_torchscript(drawn(LearningToy), tmp_path / "part.pt"))
    with pytest.raises(ModelError, match="got TorchScript"):
        Tap.of(nn.Sequential(scripted.module), "penultimate")  # type: ignore[attr-defined]
    training = predictor(net())
    training.backend.module.train()  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="in eval mode"):
        activations(training, pictures(), "penultimate")


def test_models_without_the_layer() -> None:
    with pytest.raises(ModelError, match="expected a model with a linear layer or a 2-D convolution"):
        Tap.of(ToyNet(), "penultimate").run(pictures())
    with pytest.raises(ModelError, match="expected a model with a 2-D convolution"):
        Tap.of(drawn(LearningToy), "last_convolution").run(pictures())
    with pytest.raises(ModelError, match="expected a layer of penultimate, last_convolution, features, got 'first'"):
        Tap.of(ToyNet(), "first")  # type: ignore[arg-type]
    tokens = drawn(lambda: nn.Sequential(nn.Flatten(0, 2), nn.Linear(SIDE, 4)))
    with pytest.raises(ModelError, match="activations of 6 images, got 48 rows"):
        Tap.of(tokens, "penultimate").run(pictures())


@pytest.mark.parametrize("form", FORMS)
def test_silent_channels_are_zero_and_others_as_before(form: str, tmp_path: Path) -> None:
    module = FORMS[form](net(), tmp_path)
    images = pictures()
    tap = Tap.of(module, "last_convolution")
    before = tap.run(images)[1].detach()
    assert before[:, [1, 4]].abs().sum() > 0
    silence(module, "last_convolution", torch.tensor([4, 1]), pictures(seed=9))
    after = tap.run(images)[1].detach()
    assert not after[:, [1, 4]].any()
    assert torch.equal(after[:, [0, 2, 3, 5]], before[:, [0, 2, 3, 5]])


@pytest.mark.parametrize("form", FORMS)
def test_silent_neurons_are_unheard(form: str, tmp_path: Path) -> None:
    original = net()
    images = pictures()
    expected = original.penultimate(images)
    assert expected[:, [0, 3]].abs().sum() > 0
    expected[:, [0, 3]] = 0.0
    expected = original.head(expected).detach()
    module = FORMS[form](original, tmp_path)
    silence(module, "penultimate", torch.tensor([0, 3]), pictures())
    torch.testing.assert_close(module(images), expected)
    silence(module, "penultimate", torch.tensor([], dtype=torch.int64), pictures())
    torch.testing.assert_close(module(images), expected)


@pytest.mark.parametrize("form", FORMS)
def test_features_are_what_the_first_linear_layer_takes_from_the_convolutions(form: str, tmp_path: Path) -> None:
    original, images = net(), pictures()
    pooled = original.convolved(images).mean(dim=(2, 3)).detach()
    module = FORMS[form](original, tmp_path)
    torch.testing.assert_close(Tap.of(module, "features").run(images)[1], pooled)
    silence(module, "features", torch.tensor([1, 5]), pictures(seed=9))
    pooled[:, [1, 5]] = 0.0
    torch.testing.assert_close(module(images), original.head(torch.relu(original.features(pooled))).detach())


def test_features_of_other_nets() -> None:
    dense = drawn(lambda: nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 5), nn.ReLU(), nn.Linear(5, 4)))
    maps = drawn(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    for module in (dense, maps):
        found, expected = (Tap.of(module, layer).run(pictures())[1] for layer in ("features", "penultimate"))
        assert torch.equal(found, expected)
    gated = drawn(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(6, 6), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 4))
    )
    assert Tap.of(gated, "features").run(pictures())[1].shape == (ROWS, 48)  # not what came before the last convolution


@pytest.mark.parametrize("form", ["eager", "exported", "decomposed"])
def test_neurons_before_a_last_convolution_are_unheard(form: str, tmp_path: Path) -> None:
    original = everywhere(4)
    assert isinstance(original, nn.Sequential)
    maps = original[:2](pictures())
    maps[:, 2] = 0.0
    expected = original[2:](maps).detach()
    module = FORMS[form](original, tmp_path)
    silence(module, "penultimate", torch.tensor([2]), pictures())
    torch.testing.assert_close(module(pictures()), expected)


UNSILENCED: dict[str, tuple[Callable[[], nn.Module], Layer]] = {
    "computed": (lambda: nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 4))), "penultimate"),
    "computed-convolution": (lambda: nn.Sequential(weight_norm(nn.Conv2d(1, 4, 8)), nn.Flatten()), "last_convolution"),
    "norm-without-weights": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4, affine=False), nn.Flatten()), "last_convolution",
    ),
    "activation-of-zero": (lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.Softplus(), nn.Flatten()), "last_convolution"),
    "tokens": (lambda: nn.Sequential(nn.Flatten(1, 2), nn.Linear(SIDE, 4)), "penultimate"),
    "groups": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()), "penultimate"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSILENCED)
def test_what_cannot_be_silenced_is_left_as_it_was(name: str) -> None:
    make, layer = UNSILENCED[name]
    module = drawn(make)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ModelError, match="can't be silenced"):
        silence(module, layer, torch.tensor([1]), pictures())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("channels", [[5], [-1], [[0]]])
def test_channels_that_are_none(channels: list[int]) -> None:
    with pytest.raises(ModelError, match="expected indices of penultimate channels, 0 to 4"):
        silence(net(), "penultimate", torch.tensor(channels), pictures())
