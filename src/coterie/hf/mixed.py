"""Modules of Transformers that become a little more than they are."""

from __future__ import annotations

import functools


@functools.cache
def mixed(mixin: type, kind: type) -> type:
    """`kind` with what `mixin` does differently, under the name of `kind`: one class for all modules of a kind, so that
    compiled layers share their graph."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (mixin, kind), names)
