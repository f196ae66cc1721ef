"""coterie: run and fine-tune Mixture-of-Experts models larger than your GPU."""

from . import cpu
from .activations import Activation
from .experts import Experts

cpu.read_environment()

__version__ = "0.1.0"
__all__ = ["Activation", "Experts", "cpu"]
