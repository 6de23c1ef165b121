"""What runs offline: calibration, evaluation, simulated attackers.

from calibration import calibrate, load_images

calibration = calibrate(model, load_images("clean"))
calibration.save("profile")
"""

from calibration.calibrate import Calibration, Settings, calibrate
from calibration.data import ImageSet, load_images
from calibration.discovery import Hints
from calibration.evaluation import Evaluation, evaluate
from calibration.statistics import Estimate

__all__ = ["Calibration", "Estimate", "Evaluation", "Hints", "ImageSet", "Settings", "calibrate", "evaluate", "load_images"]
