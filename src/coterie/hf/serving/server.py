"""Transformers' own OpenAI-compatible server over models that are loaded already: a model, and adapters of it by name.

Its handlers, its server and its thread for generating are used as they are. What is added: models come from `Models`
instead of being loaded by name, what a request may ask for is checked first, and an answer ends with the context.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from coterie.hf.serving import requests
from coterie.hf.serving.batching import Batches

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
SEED = "coterie_seed"  # what a request's seed is called on its generation config


class NamedModel:
    """A model under a name, which is that of an adapter or of the model without any; it passes for the model itself.

    `generate` is called by one thread, so that it may switch adapters.
    """

    def __init__(self, model: Any, adapter: str | None, stopping: threading.Event) -> None:
        self._model, self._adapter, self._stopping = model, adapter, stopping

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, generation_config: GenerationConfig, **inputs: Any) -> Any:
        seed = getattr(generation_config, SEED, None)
        if seed is not None:
            torch.manual_seed(seed)
        options = {"generation_config": generation_config, "stopping_criteria": StoppingCriteriaList([self._stop])}
        if not hasattr(self._model, "peft_config"):
            return self._model.generate(**inputs, **options)
        if self._adapter is None:
            with self._model.disable_adapter():
                return self._model.generate(**inputs, **options)
        self._model.set_adapter(self._adapter, inference_mode=True)
        return self._model.generate(**inputs, **options)

    def _stop(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((ids.shape[0],), self._stopping.is_set(), device=ids.device)


class Models:
    """What the handlers take for Transformers' ModelManager: it loads nothing and lets go of nothing."""

    force_model = None
    get_model_modality = staticmethod(ModelManager.get_model_modality)

    def __init__(self, named: dict[str, tuple[NamedModel, PreTrainedTokenizerBase]]) -> None:
        self.named = named

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, name: str, **_: Any) -> tuple[NamedModel, PreTrainedTokenizerBase]:
        return self.named[name]

    def with_template(self) -> list[str]:
        """The names of those that can chat."""
        return [name for name, (_, tokenizer) in self.named.items() if tokenizer.chat_template is not None]

    def list_models(self) -> list[dict[str, Any]]:
        return [{"id": name, "object": "model", "created": 0, "owned_by": "coterie"} for name in self.named]

    def shutdown(self) -> None:
        pass


class Fitting:
    """Mixed into what generates: a prompt must fit into the context, and its answer ends with it."""

    context: int | None = None  # tokens; None: not limited

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        self._fit(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        self._fit(inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    def _fit(self, inputs: Any, settings: GenerationConfig) -> None:
        if self.context is None:
            return
        ids = inputs["input_ids"]
        tokens = len(ids) if isinstance(ids, list) else ids.shape[-1]
        if tokens >= self.context:
            raise HTTPException(400, f"the prompt has {tokens} tokens, the model's context is {self.context}")
        settings.max_new_tokens = min(settings.max_new_tokens, self.context - tokens)


class Single(Fitting, GenerateManager):
    """One answer after the other."""


class Batch(Fitting, Batches):
    """All answers together."""


class OneAtATime(GenerationState):
    """Gives every model the same thread, so that adapters of one model take turns."""

    batched = False

    def __init__(self, context: int | None) -> None:
        super().__init__()
        self.generation = Single()
        self.generation.context = context

    def get_manager(self, model_id: str, use_cb: bool = False) -> Single:
        return self.generation

    def shutdown(self) -> None:
        """Waits until nothing is generated."""
        self.generation.submit(lambda: None).result()


class AllTogether(GenerationState):
    """Answers all requests in one batch, which has room for so many tokens."""

    batched = True

    def __init__(self, model: Any, context: int | None, tokens: int) -> None:
        super().__init__(continuous_batching=True)
        self._cb_manager = Batch(model, tokens)
        room = self._cb_manager.room
        self._cb_manager.context = room if context is None else min(context, room)

    def use_continuous_batching(self, *_: Any) -> bool:
        return True

    def get_manager(self, model_id: str, use_cb: bool = True) -> Batch:
        return self._cb_manager


class Checked:
    """Mixed into a handler: refuses what it would ignore or stumble over, and samples where that is asked for."""

    def _validate_request(self, body: dict) -> None:
        models = self.model_manager
        try:
            requests.check(body, list(models.named), models.with_template(), self._endpoint)
            if self.generation_state.batched:
                requests.check_batched(body)
        except requests.Refused as refused:
            raise HTTPException(refused.status, str(refused)) from None
        super()._validate_request(body)

    def _build_generation_config(self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False):
        seed = body.pop("seed", None)  # Transformers would set it at once, while another answer is being written
        made = super()._build_generation_config(body, model_generation_config, use_cb)
        if seed is not None:
            setattr(made, SEED, seed)
        if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") != 0):
            made.do_sample = True
        return made


class Chat(Checked, ChatCompletionHandler):
    _endpoint = "chat"


class Completions(Checked, CompletionHandler):
    _endpoint = "completions"


class Responses(Checked, ResponseHandler):
    _endpoint = "responses"

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        body.setdefault("stream", False)  # OpenAI's default; Transformers would stream


class Server:
    """The application, and the thread that generates for it.

    model: a causal LM, or a PeftModel whose adapters are served under their own names.
    tokenizers: of each adapter by name, and of the model alone by None.
    context: tokens of prompt and answer together. batch_tokens: room for the tokens of all requests, which are then
    answered together; None: one after the other. Raises UnsupportedModelError for a model that cannot be batched.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizers: dict[str | None, PreTrainedTokenizerBase],
        context: int | None,
        batch_tokens: int | None = None,
    ) -> None:
        self._stopping = threading.Event()
        models = Models(
            {
                adapter or name: (NamedModel(model, adapter, self._stopping), tokenizer)
                for adapter, tokenizer in tokenizers.items()
            }
        )
        self._state = AllTogether(model, context, batch_tokens) if batch_tokens else OneAtATime(context)
        self.app: FastAPI = build_server(
            models,
            Chat(models, self._state),
            completion_handler=Completions(models, self._state),
            response_handler=Responses(models, self._state),
            transcription_handler=None,
            systemone_handler=None,
            generation_state=self._state,
        )
        self.app.router.routes[:] = [route for route in self.app.router.routes if route.path in ROUTES]

    def stop(self) -> None:
        """Ends what is still being written, after its next token, and waits for that."""
        self._stopping.set()
        self._state.shutdown()
