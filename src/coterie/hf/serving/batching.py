"""Requests answered together by Transformers' continuous batching, each with its own temperature, top-k and top-p."""

from __future__ import annotations

import copy
import uuid
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.utils import CBGenerateManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.utils import logging

from coterie.errors import UnsupportedModelError
from coterie.hf.inference.sampling import alone, draw

PAGE = 256  # tokens
STEP = 256  # tokens of a forward pass at most, of all requests: a long prompt is read in pieces
# Only what is set here can be set for a request; each sets all three.
SETTABLE = {"do_sample": True, "temperature": 0.5, "top_k": 50, "top_p": 0.5}


class Batches(CBGenerateManager):
    """The thread that generates for all requests. tokens: of prompts and answers that the cache has room for.

    Raises UnsupportedModelError for a model that Transformers cannot batch, which is tried.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        super().__init__()
        self._vocabulary = model.config.get_text_config().vocab_size
        self.room = -(-tokens // PAGE) * PAGE
        config = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=self.room // PAGE, max_batch_tokens=STEP, per_request_processors=True
        )
        before = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)  # what fails here is raised below
        try:
            self.init_cb(model, GenerationConfig(eos_token_id=-1, **SETTABLE), config)
            self._try()
        except Exception as error:
            self.stop()
            raise UnsupportedModelError(
                f"{type(model).__name__}: Transformers cannot batch its requests ({str(error)[:200]}): answer them one "
                "after the other, without --batch-tokens"
            ) from error
        finally:
            logging.set_verbosity(before)

    def init_cb(self, model: Any, gen_config: GenerationConfig, config: ContinuousBatchingConfig | None = None) -> None:
        """Starts the thread; the handlers, which ask for it with each request, find it started."""
        if self._cb is None:
            self._cb = model.init_continuous_batching(generation_config=gen_config, continuous_batching_config=config)
            self._cb.logit_processor.__class__ = DrawnTogether
            self._cb.generation_config.do_sample = False  # what is left of the scores is what was drawn
            self._cb.start()

    def _try(self) -> None:
        """Generates two tokens."""
        tried = self._cb.add_request([0], max_new_tokens=2, eos_token_id=-1)
        while True:
            result = self._cb.get_result(timeout=1)
            if self._cb.background_thread_status.fatal_error is not None:
                raise RuntimeError(self._cb.background_thread_status.fatal_error)
            if result is not None and result.request_id == tried and result.error is not None:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                return

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        request = self._for(gen_config)
        return CBGenerateManager.generate_streaming(
            request, model, processor, inputs, gen_config, str(uuid.uuid4()), response_parser
        )

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        request = self._for(gen_config)
        return await CBGenerateManager.generate_non_streaming(
            request, model, processor, inputs, gen_config, str(uuid.uuid4())
        )

    def _for(self, settings: GenerationConfig) -> Batches:
        """This, adding how a request's tokens are chosen to it."""
        greedy = not settings.do_sample
        sampling = {
            "temperature": float(1.0 if greedy else settings.temperature or 1.0),
            "top_k": 1 if greedy else int(settings.top_k or self._vocabulary),
            "top_p": float(1.0 if greedy or settings.top_p is None else settings.top_p),
        }
        request = copy.copy(self)
        request._cb = Sampled(self._cb, sampling)
        return request


class DrawnTogether(ContinuousBatchingLogitsProcessorList):
    """The processors of SETTABLE, as one that draws a token for each request by its own options."""

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        rows = len(scores)
        temperature, top_k, top_p = logits_processor_args[:, :rows]
        scores = scores / temperature.view(torch.float32)[:, None]
        return alone(scores, draw(scores, top_k.long(), top_p.view(torch.float32), torch.zeros(rows)))


class Sampled:
    """Transformers' manager of batches, with how the tokens of one request are chosen."""

    def __init__(self, batches: Any, sampling: dict[str, Any]) -> None:
        self._batches, self._sampling = batches, sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def add_request(self, *arguments: Any, **options: Any) -> str:
        added = self._batches.add_request(*arguments, **options, **self._sampling)
        if added is None:
            raise RuntimeError("the server is stopping")
        return added
