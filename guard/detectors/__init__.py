"""Online tests of single inputs."""

from guard.detectors.detector import Detector, Inspection
from guard.detectors.strip import Blend, Strip, blend_images, entropy_bits

__all__ = ["Blend", "Detector", "Inspection", "Strip", "blend_images", "entropy_bits"]
