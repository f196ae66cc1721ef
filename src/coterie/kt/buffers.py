"""The batch sizes whose staging buffers are kept, and letting go of what is kept between calls."""

from __future__ import annotations

from collections.abc import Iterable

from coterie.errors import ArgumentError
from coterie.kt import deferral

_capture_batch_sizes: list[int] = []


class Buffers:
    """Static calls of the factory and of the objects it makes; they are for the whole process."""

    @staticmethod
    def set_capture_batch_sizes(capture_bs: Iterable[int]) -> None:
        """Names the numbers of tokens of which staging buffers are to be kept; CPU tensors need none.

        Raises ArgumentError for sizes that are not positive.
        """
        sizes = list(capture_bs)
        if any(size < 1 for size in sizes):
            raise ArgumentError(f"capture_bs: expected positive batch sizes, found {sizes}")
        _capture_batch_sizes[:] = sizes

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """The batch sizes that were set, in their order."""
        return list(_capture_batch_sizes)

    @staticmethod
    def clear_buffer_cache() -> None:
        """Lets go of deferred sums that no layer has taken: for batches that were given up between two layers."""
        deferral.clear()

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """Nothing to do: training keeps no buffers between its steps."""
