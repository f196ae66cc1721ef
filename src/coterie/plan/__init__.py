"""Will this model fit, how fast can it be, what does fine-tuning it take: worked out without its weights being read.

The model is built by Transformers on the meta device and run there once, so what is counted is what would be loaded:
no table of models, and no formula for any kind of attention.
"""

from coterie.plan.anatomy import PROMPT, Anatomy, ExpertLayer, LinearLayer, inspect
from coterie.plan.conversion import DISK, Conversion, conversion, keeping_rate
from coterie.plan.dense import SENSIBLE, Dense, dense, sensible
from coterie.plan.estimate import REACHED, RESERVE, Estimate, Rates, estimate, usable
from coterie.plan.overhead import overhead
from coterie.plan.placement import ANSWER, ASSUMED, GpuRates, Placement, choose, find_room, placements
from coterie.plan.source import Source, open_source
from coterie.plan.training import TrainAnatomy, Training, train_estimate, train_inspect

__all__ = [
    "ANSWER",
    "ASSUMED",
    "DISK",
    "PROMPT",
    "REACHED",
    "RESERVE",
    "SENSIBLE",
    "Anatomy",
    "Conversion",
    "Dense",
    "Estimate",
    "ExpertLayer",
    "GpuRates",
    "LinearLayer",
    "Placement",
    "Rates",
    "Source",
    "TrainAnatomy",
    "Training",
    "choose",
    "conversion",
    "dense",
    "estimate",
    "find_room",
    "inspect",
    "keeping_rate",
    "open_source",
    "overhead",
    "placements",
    "sensible",
    "train_estimate",
    "train_inspect",
    "usable",
]
