"""Simulated attackers: used to measure, never to serve."""

from calibration.attacks.badnets import BadNets

__all__ = ["BadNets"]
