"""Online tests of single inputs."""

from guard.detectors.activation import ActivationFilter, excited_neurons
from guard.detectors.boundaries import Boundaries
from guard.detectors.detector import Detector, Inspection
from guard.detectors.feature_squeezing import FeatureSqueezing, Squeezer
from guard.detectors.strip import Blend, Strip, blend_images, entropy_bits

__all__ = [
    "ActivationFilter",
    "Blend",
    "Boundaries",
    "Detector",
    "FeatureSqueezing",
    "Inspection",
    "Squeezer",
    "Strip",
    "blend_images",
    "entropy_bits",
    "excited_neurons",
]
