"""Registers coterie with Transformers and PEFT once they are imported too, in either order.

Importing Transformers' model code takes seconds and half of coterie does without it, so `import coterie` does not: the
experts implementation and the quantizer are registered right after `transformers.modeling_utils` is imported, without
which no model can be loaded, LoRA on packed experts right after PEFT's LoRA model, and the check of saved adapters
right after what loads them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

HOOKS = {
    "transformers.modeling_utils": "coterie.hf",
    "peft.tuners.lora.model": "coterie.hf.peft",
    "peft.peft_model": "coterie.hf.adapter_fit",
}
LOST = {
    "coterie.hf": "packed models cannot be loaded",
    "coterie.hf.peft": "packed experts cannot be fine-tuned",
    "coterie.hf.adapter_fit": "adapters of other models are not recognised",
}


def install() -> None:
    """Registers now with what is imported already, with the rest as soon as it is."""
    for trigger in HOOKS:
        if trigger in sys.modules:
            _register(trigger)
        elif not any(isinstance(finder, _Finder) and finder.trigger == trigger for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(trigger))


class _Finder(importlib.abc.MetaPathFinder):
    """Leaves finding to the others, and has the module `trigger` followed by the registration."""

    def __init__(self, trigger: str) -> None:
        self.trigger = trigger

    def find_spec(self, fullname, path, target=None):
        if fullname != self.trigger:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                _register(self.trigger)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(trigger: str) -> None:
    name = HOOKS[trigger]
    try:
        importlib.import_module(name)
    except ImportError as error:
        library = trigger.partition(".")[0]
        warnings.warn(
            f"coterie does not work with this version of {library} ({error}): {LOST[name]}",
            stacklevel=2,
        )
