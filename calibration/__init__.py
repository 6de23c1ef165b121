"""What runs offline: calibration, evaluation, simulated attackers, the red team.

from calibration import calibrate, load_images

calibration = calibrate(model, load_images("clean"))
calibration.save("profile")
"""

from calibration.data import ImageSet, load_images
from calibration.discovery import Hints
from guard.errors import MissingExtraError

try:
    from calibration.calibrate import Calibration, calibrate
    from calibration.evaluation import Evaluation, evaluate
    from calibration.red_team import RedTeam, red_team, split
    from calibration.settings import BlendChoice, DetectorChoice, PassesChoice, PrecisionChoice, Settings
    from calibration.statistics import Estimate
except ModuleNotFoundError as error:  # a thin device has no statistics, and still reads images and repaired models
    if error.name is None or error.name.partition(".")[0] not in ("scipy", "sklearn"):
        raise
    _missing = error.name.partition(".")[0]

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise MissingExtraError(_missing, "calibration")
        raise AttributeError(name)


__all__ = [
    "BlendChoice",
    "Calibration",
    "DetectorChoice",
    "Estimate",
    "Evaluation",
    "Hints",
    "ImageSet",
    "PassesChoice",
    "PrecisionChoice",
    "RedTeam",
    "Settings",
    "calibrate",
    "evaluate",
    "load_images",
    "red_team",
    "split",
]
