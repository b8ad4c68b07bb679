"""Arithmetic on trainable weights, and the one place that runs and counts passes."""

from mithridate.weights.arithmetic import Gradient, WeightSpace, dot, norm
from mithridate.weights.oracle import GradientOracle, PassCount

__all__ = ["Gradient", "GradientOracle", "PassCount", "WeightSpace", "dot", "norm"]
