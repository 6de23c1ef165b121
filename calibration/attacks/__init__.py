"""Simulated attackers: used to measure, never to serve. One file per scheme; the contract is `Attack`."""

from calibration.attacks.adaptive import Adaptive
from calibration.attacks.all_to_all import AllToAll
from calibration.attacks.amplified import Amplified
from calibration.attacks.attack import Attack
from calibration.attacks.badnets import BadNets
from calibration.attacks.blended import Blended
from calibration.attacks.clean_label import CleanLabel
from calibration.attacks.invisible import Invisible
from calibration.attacks.multi_target import MultiTarget
from calibration.attacks.patch import Patch
from calibration.attacks.reflection import Reflection
from calibration.attacks.sig import Sig
from calibration.attacks.source_specific import SourceSpecific
from calibration.attacks.steganographic import Steganographic
from calibration.attacks.trojan import Trojan
from calibration.attacks.trojan_net import TrojanNet

__all__ = [
    "Adaptive",
    "AllToAll",
    "Amplified",
    "Attack",
    "BadNets",
    "Blended",
    "CleanLabel",
    "Invisible",
    "MultiTarget",
    "Patch",
    "Reflection",
    "Sig",
    "SourceSpecific",
    "Steganographic",
    "Trojan",
    "TrojanNet",
]
