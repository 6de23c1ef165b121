"""backdoor-guard at inference time: wrap a vision model that somebody else trained, and refuse suspicious inputs.

from guard import Guard

guard = Guard.load("profile", model)
verdicts = guard(images)
safe_predict = guard.wrap(predict, on_reject="abstain")
"""

from guard.decoding import Limits, decode_image
from guard.errors import GuardError, InputError, RejectedError
from guard.guard import CalibratedDetector, Guard
from guard.images import InputSpec
from guard.predictors import Predictor
from guard.profile import Profile, load_profile
from guard.quarantine import Quarantine
from guard.verdict import Finding, Policy, Verdict

__version__ = "0.1.0"

__all__ = [
    "CalibratedDetector",
    "Finding",
    "Guard",
    "GuardError",
    "InputError",
    "InputSpec",
    "Limits",
    "Policy",
    "Predictor",
    "Profile",
    "Quarantine",
    "RejectedError",
    "Verdict",
    "decode_image",
    "load_profile",
]
