"""What runs offline: calibration, evaluation, simulated attackers, the red team.

from calibration import calibrate, load_images

calibration = calibrate(model, load_images("clean"))
calibration.save("profile")
"""

from calibration.calibrate import Calibration, calibrate
from calibration.data import ImageSet, load_images
from calibration.discovery import Hints
from calibration.evaluation import Evaluation, evaluate
from calibration.red_team import RedTeam, red_team, split
from calibration.settings import BlendChoice, Settings
from calibration.statistics import Estimate

__all__ = [
    "BlendChoice",
    "Calibration",
    "Estimate",
    "Evaluation",
    "Hints",
    "ImageSet",
    "RedTeam",
    "Settings",
    "calibrate",
    "evaluate",
    "load_images",
    "red_team",
    "split",
]
