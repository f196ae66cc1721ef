"""Conversion tools: checkpoints in, packed checkpoints out."""

from coterie.convert.cpu import convert_cpu
from coterie.convert.output import finished_layers
from coterie.convert.progress import Progress
from coterie.convert.report import ConversionReport, ProjectionError

__all__ = ["ConversionReport", "Progress", "ProjectionError", "convert_cpu", "finished_layers"]
