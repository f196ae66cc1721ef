"""Registers coterie with Transformers once both are imported, in either order.

Importing Transformers' model code takes seconds and half of coterie does without it, so `import coterie` does not: the
experts implementation and the quantizer are registered right after `transformers.modeling_utils` is imported, without
which no model can be loaded.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

TRIGGER = "transformers.modeling_utils"


def install() -> None:
    """Registers now if Transformers' model code is imported already, otherwise as soon as it is."""
    if TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Leaves finding to the others, and has `TRIGGER` followed by the registration."""

    def find_spec(self, fullname, path, target=None):
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        importlib.import_module("coterie.hf")
    except ImportError as error:
        warnings.warn(
            f"coterie does not work with this version of transformers ({error}): packed models cannot be loaded",
            stacklevel=2,
        )
