"""The demo's second half: the model is repaired from what the server rejected, and its original goes on detecting."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from calibration import Settings, calibrate
from calibration.discovery import Hints, discover
from calibration.report import calibration_report
from calibration.sources import open_model, open_tripwire
from cli.demonstration.digits import Digits
from cli.extras import needs


class Repair(msgspec.Struct, frozen=True, kw_only=True):
    """What the repair came to; shares.

    Attributes:
        quarantined: Images that the server had rejected.
        old_answer_kept: Held-out quarantined images that the repaired model answers as the original did.
        clean_accuracy_before: On held-out clean images.
        clean_accuracy_after: Likewise.
        seconds: That it took.
        report: Page of the repair.
        profile: Folder of the profile with both models.
    """

    quarantined: int
    old_answer_kept: float | None
    clean_accuracy_before: float | None
    clean_accuracy_after: float | None
    seconds: float
    report: str
    profile: str


def repair_digits(digits: Digits, out: Path, rejected: Path, seed: int, progress: Callable[[str, int, int], None]) -> Repair:
    """Do what `guard repair --method codefend` and `guard calibrate --tripwire` do.

    Args:
        digits: The images.
        out: Folder of the demo, with the model.
        rejected: The server's quarantine.
        seed: Of the repair and the calibration.
        progress: Told how far it is.

    Raises:
        MissingExtraError: What a repair needs is not installed.
        RepairError: Too few images were rejected.
    """
    with needs("repair"):
        from calibration.engine import Engine
        from calibration.repair.cases import load_quarantined
        from calibration.repair.cyclegan import Training
        from calibration.repair.record import read_record
        from calibration.repair.settings import RepairSettings
        from calibration.repair.work import repair_into

    model, repaired, profile = out / "model.pt2", out / "repaired", out / "repaired-profile"
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch:
        source = open_model(str(model), None, Path(scratch))
        predictor = discover(source.backend, digits.clean)
        quarantined = load_quarantined(rejected, predictor.spec.shape, progress=progress)
        gan = Training(width=12, blocks=1, rate=5e-4)  # these, and so few epochs, are enough for digits
        settings = RepairSettings(method="codefend", epochs=25, gan=gan, seed=seed % 2**31)
        images = quarantined.images(slice(None))
        repair_into(repaired, source, predictor, digits.clean, settings, images, Engine(), progress)
        source = open_model(str(repaired), None, Path(scratch))
        tripwire, file = open_tripwire(str(model), None, Path(scratch), Hints(), source)
        calibration = calibrate(
            source.backend,
            digits.clean,
            Settings(seed=seed),
            record=source.record,
            tripwire=tripwire,
            learnt=source.learnt,
            progress=progress,
        )
        calibration.save(profile, source.file, {"report.html": calibration_report(calibration)}, file)
    record = read_record(repaired)
    return Repair(
        quarantined=len(quarantined),
        old_answer_kept=record.attack_success_seen_after,
        clean_accuracy_before=record.clean_accuracy_before,
        clean_accuracy_after=record.clean_accuracy_after,
        seconds=record.seconds,
        report=str(repaired / "report.html"),
        profile=str(profile),
    )
