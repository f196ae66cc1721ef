"""Decoding on a GPU: the forward of one more token is captured as a CUDA graph and replayed, which takes none of the
time that Python and hundreds of launches take.

Transformers asks a model for a compiled forward wherever its cache is of fixed size; it is given this one. Unless
something else is asked for, such a cache is taken on a GPU wherever there is room for it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.utils import GenerationMode
from transformers.utils import logging

from coterie.errors import ArgumentError
from coterie.gpu import ordered
from coterie.gpu.device import free_nbytes
from coterie.hf import skeleton
from coterie.hf.empty import empty_model
from coterie.hf.inference import attention, cache
from coterie.hf.inference.growing import make_growing
from coterie.hf.inference.proving import is_heard

LEAST = 1024  # tokens that a cache holds
SHARE = 0.5  # of the free memory that such a cache may take
OUTPUTS = ("output_attentions", "output_hidden_states")
MASKED = (attention.SDPA, attention.EAGER, attention.NAME, attention.NAME_EAGER)  # which leave out what a mask hides
REFUSED, TOKEN_NBYTES = "_coterie_not_captured", "_coterie_token_nbytes"  # of a model
logger = logging.get_logger(__name__)


def is_fixed(found: Any) -> bool:
    """Whether nothing of a cache is kept outside of tensors whose sizes and addresses stay."""
    return isinstance(found, StaticCache) and all(type(layer) is StaticLayer for layer in found.layers)


def usable(model: PreTrainedModel) -> bool:
    """Whether a model is where there are CUDA graphs."""
    return model.device.type == "cuda" and not torch.version.hip


def fix_cache(
    model: PreTrainedModel, settings: GenerationConfig, mode: GenerationMode, sequences: int, tokens: int
) -> None:
    """Asks for a cache of fixed size in `settings`, of one call of `generate`, where nothing else is asked for, and it
    is one that decodes as a graph and has room."""
    others = ("cache_implementation", "compile_config", "disable_compile", "is_assistant", "prefill_chunk_size")
    others += OUTPUTS
    plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and settings.use_cache is not False
    if not usable(model) or not plain or any(getattr(settings, name, None) for name in others) or not _is_silent(model):
        return
    if model.training or model.config._attn_implementation not in MASKED or getattr(model, REFUSED, False):
        return
    try:
        nbytes = _token_nbytes(model) * sequences * (settings.num_return_sequences or 1)
    except Exception:  # of a model that cannot be made without weights, or has a cache of its own
        return
    most = SHARE * (free_nbytes(model.device) or 0) / nbytes if nbytes else 0
    twice = max(LEAST, 1 << (tokens - 1).bit_length())  # a conversation then outgrows it a few times only
    length = twice if twice <= most else tokens
    if length <= most:
        settings.cache_implementation, settings.max_cache_len = "static", length
        model._previous_max_cache_length = -1  # Transformers would take the longest that there was


def check_cache(found: Any, tokens: int) -> None:
    """Raises ArgumentError for a cache of fixed size that an answer does not go into."""
    if isinstance(found, StaticCache) and not cache.has_room(found, tokens):
        raise ArgumentError(
            f"the cache that was given holds fewer than {tokens} tokens: generate without it, or have it grow from the "
            'first answer on: cache_implementation="dynamic"'
        )


def _token_nbytes(model: PreTrainedModel) -> float:
    """Of the cache of one sequence, for each token; 0 for one that is not of fixed size."""
    if not hasattr(model, TOKEN_NBYTES):
        config = copy.deepcopy(model.config)  # which a trace gives experts of its own
        nbytes = 0
        if is_fixed(StaticCache(config=config.get_text_config(decoder=True), max_cache_len=1)):
            nbytes, _ = skeleton.trace(empty_model(config, dtype=model.dtype).eval(), LEAST)
        setattr(model, TOKEN_NBYTES, nbytes / LEAST)
    return getattr(model, TOKEN_NBYTES)


def _is_silent(model: PreTrainedModel) -> bool:
    """Whether nobody listens to its modules, who would hear nothing of a replay."""
    hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    return not has_global_hooks() and not any(
        (module._forward_hooks and is_heard(module._forward_hooks))
        or any(hook is not make_growing for hook in module._forward_pre_hooks.values())
        for module in hooks
    )


class GraphedForward:
    """The forward of a model that decodes, for one call of `generate`. What cannot be captured is computed as ever."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._key: Any = None
        self._replay: Callable[[list[Tensor]], Any] | None = None
        self._silent = _is_silent(model)

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for these inputs. Its tensors are written anew by the next call."""
        found = inputs.pop(cache.NAME, None)
        leaves, spec = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kinds = [(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves]
        asked = any(inputs.get(name) for name in OUTPUTS)  # which Transformers keeps of each token
        takes = self._silent and not asked and not getattr(self.model, REFUSED, False)
        if not takes or not is_fixed(found) or torch.is_grad_enabled():
            return self.model(**inputs, **{cache.NAME: found})
        key = (id(found), spec, kinds)
        if key != self._key:  # the first time kernels are compiled, and libraries take their memory
            self._key, self._replay = key, None
            return self.model(**inputs, **{cache.NAME: found})
        if self._replay is None:
            try:
                self._replay = self._captured(found, leaves, spec)
            except Exception as error:  # whatever the model's own code does that a graph cannot hold
                setattr(self.model, REFUSED, True)
                logger.warning_once(
                    f"{type(self.model).__name__} decodes without a CUDA graph, which is slower: {str(error)[:300]}"
                )
                return self.model(**inputs, **{cache.NAME: found})
        return self._replay(tensors)

    def _captured(self, found: Cache, leaves: list[Any], spec: Any) -> Callable[[list[Tensor]], Any]:
        """Copies tensors in, replays, and gives the output."""
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = tree_unflatten(own, spec)
        replay, out = captured(self.model.device, lambda: self.model(**inputs, **{cache.NAME: found}))
        places = [leaf for leaf in own if isinstance(leaf, Tensor)]

        def run(tensors: list[Tensor]) -> Any:
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor)
            ordered.check()
            replay()
            return out

        return run


def captured(device: torch.device, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """(what replays a call on a CUDA device, the call's result, which each replay writes)."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        ordered.check()
        graph, pool, before = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        state = random.clone_state()
        try:
            with torch.cuda.graph(graph, pool, torch.cuda.Stream(), capture_error_mode="thread_local"):
                out = call()
        except Exception:
            # torch leaves all that as it was while capturing.
            torch.cuda.set_stream(before)
            random.graphsafe_set_state(state)
            with contextlib.suppress(Exception):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, out
