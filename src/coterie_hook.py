"""Registers coterie with Transformers and PEFT once they are imported, whoever imports them and in whatever order.

`coterie.pth` installs this whenever Python starts, so that a program that never imports coterie opens packed
checkpoints too. It lies beside the package, not in it, and imports nothing: importing the package takes torch.
Transformers' model code takes seconds to import, so nothing here does: the experts implementation and the quantizer are
registered right after `transformers.modeling_utils` is imported, without which no model can be loaded, LoRA on packed
experts right after PEFT's LoRA model, the check of saved adapters right after what loads them, and going on from packed
checkpoints right after the Trainer.
"""

import sys

HOOKS = {
    "transformers.modeling_utils": "coterie.hf",
    "transformers.trainer": "coterie.hf.trainer",
    "peft.tuners.lora.model": "coterie.hf.peft",
    "peft.peft_model": "coterie.hf.adapter_fit",
}
LOST = {
    "coterie.hf": "packed models cannot be loaded",
    "coterie.hf.trainer": "training without an adapter cannot go on from a checkpoint",
    "coterie.hf.peft": "packed experts cannot be fine-tuned",
    "coterie.hf.adapter_fit": "adapters of other models are not recognised",
}


class _Finder:
    """Leaves finding to the others, and has the modules named in HOOKS followed by the registration."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in HOOKS:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                return _followed(spec)
        return None


FINDER = _Finder()


def install():
    """Registers now with what is imported already, with the rest as soon as it is. May be called again."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    for trigger in HOOKS:
        module = sys.modules.get(trigger)
        # One that is still being imported is registered with at its end.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _register(trigger)


def _followed(spec):
    """The spec of a module, whose execution is followed by the registration."""
    execute = getattr(spec.loader, "exec_module", None)
    if execute is not None:

        def exec_module(module):
            execute(module)
            _register(spec.name)

        spec.loader.exec_module = exec_module
    return spec


def _register(trigger):
    """Imports what registers; whatever goes wrong there, the module that was asked for is not the worse for it."""
    import importlib
    import warnings

    name = HOOKS[trigger]
    try:
        importlib.import_module(name)
    except Exception as error:
        library = trigger.partition(".")[0]
        version = getattr(sys.modules.get(library), "__version__", "of unknown version")
        warnings.warn(
            f"coterie does not work with this {library} ({version}): {LOST[name]} ({type(error).__name__}: {error})",
            stacklevel=2,
        )
