"""What a thin device and an edge server say to each other: names, sizes, checksums, and nothing that is unpickled.

    POST   /v1/jobs                     a `JobRequest` as JSON     201, a `JobStatus`
    PUT    /v1/jobs/{id}/files/{name}   the bytes                  204
    POST   /v1/jobs/{id}/start          nothing                    202, a `JobStatus`
    GET    /v1/jobs/{id}                                           200, a `JobStatus`
    GET    /v1/jobs/{id}/files/{name}   one file of the result     200, the bytes
    DELETE /v1/jobs/{id}                                           204
    GET    /ping                        without the token          200

Every other request carries `Authorization: Bearer TOKEN`. The result's manifest is sealed with that token, so that a
file that was changed is refused even where its checksum was changed along with it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Annotated, Literal

import msgspec

from guard.errors import UNREADABLE, EdgeError
from guard.images import Container, DType, Layout
from guard.predictors import OutputKind

MODELS = ("model.safetensors", "model.pt", "model.pt2", "model.onnx")
CLEAN = "clean.npz"
QUARANTINE = "quarantine.npz"
FEWEST_TOKEN_CHARACTERS = 16

JOB_ID = re.compile(r"[0-9a-f]{32}")

State = Literal["receiving", "queued", "running", "done", "failed"]

_TOKEN = re.compile(r"[!-~]+")
_RESULT = re.compile(r"(?:profile/)?[a-z][a-z_]{0,39}\.(?:json|html|safetensors|pt|pt2|onnx)")
_SEALED = b"backdoor-guard edge result 1\n"
_Epochs = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
_Numbers = Annotated[tuple[float, ...], msgspec.Meta(max_length=3)]


class FileInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file, as it must arrive.

    Attributes:
        name: Of a fixed list for what is sent, of a fixed form for what comes back.
        size: Bytes.
        sha256: Hex.
    """

    name: Annotated[str, msgspec.Meta(max_length=80)]
    size: Annotated[int, msgspec.Meta(ge=1, le=2**48)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class RepairOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What `guard repair` is told; None leaves it its default.

    Attributes:
        method: `gym` or `codefend`.
        recipe: Of gym.
        views: Of gym's preprocessor.
        epochs: Of fine-tuning.
        gan_epochs: Of codefend's CycleGAN.
        max_accuracy_drop: Points of clean accuracy.
        allow_missing_classes: Go on when a class has no clean image.
        seed: Of all draws.
        mean: Of the model's input, per channel.
        std: Likewise.
        output: What the model returns.
        layout: Of its input.
        dtype: Of its input.
        container: Of its input.
    """

    method: Literal["gym", "codefend"]
    recipe: Literal["distilled", "paper"] | None = None
    views: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    epochs: _Epochs | None = None
    gan_epochs: _Epochs | None = None
    max_accuracy_drop: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] | None = None
    allow_missing_classes: bool = False
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    mean: _Numbers = ()
    std: _Numbers = ()
    output: OutputKind | None = None
    layout: Layout | None = None
    dtype: DType | None = None
    container: Container | None = None


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a device asks for.

    Attributes:
        options: How to repair.
        files: What it is going to send: one model, the clean set, and the quarantine, which only gym can do without.
        factory: `package.module:factory` of the module whose weights `model.safetensors` holds; the server must allow it.
    """

    options: RepairOptions
    files: Annotated[tuple[FileInfo, ...], msgspec.Meta(max_length=3)]
    factory: Annotated[str, msgspec.Meta(max_length=200, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")] | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be a job."""
        names = [item.name for item in self.files]
        models = [name for name in names if name in MODELS]
        if len(models) != 1 or len(set(names)) != len(names) or not set(names) <= {models[0], CLEAN, QUARANTINE}:
            raise ValueError(f"expected {CLEAN}, {QUARANTINE} and one of {', '.join(MODELS)}, each once, got other names")
        needed = {CLEAN, QUARANTINE} if self.options.method == "codefend" else {CLEAN}
        if not needed <= set(names):
            raise ValueError(f"expected {' and '.join(sorted(needed))} for {self.options.method}, got less")
        if (self.factory is not None) != (models[0] == "model.safetensors"):
            raise ValueError("expected model.safetensors with a factory, and another model file without one")

    @property
    def model(self) -> FileInfo:
        """The model's file."""
        return next(item for item in self.files if item.name in MODELS)

    def file(self, name: str) -> FileInfo | None:
        """A declared file."""
        return next((item for item in self.files if item.name == name), None)


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is.

    Attributes:
        what: The step.
        done: Of it.
        total: Of it.
    """

    what: str
    done: int
    total: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a job.

    Attributes:
        job: Its id.
        sent: What it was made of.
        files: The result.
        note: What must be said with it: why there is no profile.
    """

    job: str
    sent: tuple[FileInfo, ...]
    files: tuple[FileInfo, ...]
    note: str | None = None


class Sealed(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest and what proves that it was not changed.

    Attributes:
        manifest: A `Manifest`, the very JSON that was sealed.
        seal: HMAC-SHA256 (hex), see `seal`.
    """

    manifest: str
    seal: str


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a device is told of its job.

    Attributes:
        id: Of the job.
        state: Where it is.
        ahead: Jobs that come before it.
        missing: Files that have not arrived.
        progress: Of the step that runs.
        error: Why it failed, in one line.
        result: What came of it.
    """

    id: str
    state: State
    ahead: int = 0
    missing: tuple[str, ...] = ()
    progress: Progress | None = None
    error: str | None = None
    result: Sealed | None = None


def check_token(token: str) -> str:
    """A token without the blanks around it.

    Raises:
        EdgeError: It is too short, or can't be put into a header.
    """
    token = token.strip()
    if len(token) < FEWEST_TOKEN_CHARACTERS or not _TOKEN.fullmatch(token):
        raise EdgeError(
            f"expected a token of at least {FEWEST_TOKEN_CHARACTERS} printable ASCII characters and no blanks, got "
            f"{len(token)} characters: make one with openssl rand -hex 32"
        )
    return token


def check_job_id(job_id: str) -> str:
    """A job's id, once it was looked at.

    Raises:
        EdgeError: It is none.
    """
    if not JOB_ID.fullmatch(job_id):
        raise EdgeError("expected a job's id of 32 hexadecimal digits, got something else: see what guard repair printed", 404)
    return job_id


def is_result_name(name: str) -> bool:
    """Whether a result may hold a file of this name; such names stay inside its folder."""
    return _RESULT.fullmatch(name) is not None


def seal(token: str, manifest: str) -> str:
    """HMAC-SHA256 (hex) of a manifest, keyed by the token that both sides hold."""
    return hmac.new(token.encode(), _SEALED + manifest.encode(), hashlib.sha256).hexdigest()


def open_sealed(token: str, sealed: Sealed) -> Manifest:
    """The manifest, once its seal was verified.

    Raises:
        EdgeError: The seal is another, or names in it lead elsewhere.
    """
    if not hmac.compare_digest(seal(token, sealed.manifest).encode(), sealed.seal.encode(errors="replace")):
        raise EdgeError(
            "refused the edge server's result: its manifest was changed, or sealed with another token; fetch it "
            "again, or repair again"
        )
    try:
        manifest = msgspec.json.decode(sealed.manifest, type=Manifest)
    except UNREADABLE as error:
        raise EdgeError(
            f"expected a manifest of this version, got another ({error}): bring both sides to one version"
        ) from error
    names = [item.name for item in manifest.files]
    if len({name.casefold() for name in names}) != len(names) or not all(map(is_result_name, names)):
        raise EdgeError("refused the edge server's result: it names files that no repaired model's folder has")
    return manifest
