"""The quickstart's fine-tuning: a short run on the bundled chats, and what it changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from coterie import cpu
from coterie.hf.loading import from_pretrained
from coterie.train.config import EXPERT_PARAMETERS
from coterie.train.example import DATA

STEPS = 320
SECONDS = 75  # where the machine is slow, training stops early
BATCH = 8
LOGS = 8
TOKENS = 64
QUESTIONS = ('Tell me about the "range" type.', "Explain an OR pattern.", 'What is the "nonlocal" statement?')


@dataclass(frozen=True)
class Measured:
    """What a model does: the loss of a token of the answers it was taught (asked for in other words) and of answers it
    was not taught, and its own answers to QUESTIONS."""

    taught: float
    untaught: float
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Tuned:
    """What a run did; `reloaded` is the saved adapter on the packed model loaded anew."""

    before: Measured
    after: Measured
    reloaded: Measured
    seconds: float
    nbytes: int


def fine_tune(
    base: Path, folder: Path, tokenizer: Any, doing: Callable[[str], None], on_loss: Callable[[int, float], None]
) -> Tuned:
    """Trains an adapter on the packed checkpoint `base` and saves it to `folder`.

    doing: told what is being done. on_loss: told the step and the mean loss since the last time, LOGS times.
    """
    with one_thread():
        doing("measuring how it answers questions")
        model = from_pretrained(base)
        before = measure(model, tokenizer)
        doing("fine-tuning")
        set_seed(0)
        lora = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj"],
            target_parameters=EXPERT_PARAMETERS,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
        seconds = train(model, tokenizer, folder, on_loss)
        model.save_pretrained(folder)
        doing("comparing with what it was")
        after = measure(model.eval(), tokenizer)
        reloaded = measure(PeftModel.from_pretrained(from_pretrained(base), folder), tokenizer)
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Tuned(before, after, reloaded, seconds, nbytes)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch and for the experts: in a model so small, several would mostly wait for each other."""
    before = torch.get_num_threads(), cpu.threads()
    torch.set_num_threads(1)
    cpu.set_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cpu.set_threads(before[1])


def train(model: Any, tokenizer: Any, folder: Path, on_loss: Callable[[int, float], None]) -> float:
    """At most STEPS steps or SECONDS seconds; the seconds it took."""
    datasets.disable_progress_bars()
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        assistant_only_loss=True,
        gradient_checkpointing=False,
        logging_steps=max(1, STEPS // LOGS),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    rows = datasets.Dataset.from_list([{"messages": messages} for messages in chats("train")])
    watch = Watch(on_loss)
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return time.perf_counter() - watch.start


class Watch(TrainerCallback):
    """Tells the loss, and stops a run that takes too long."""

    def __init__(self, on_loss: Callable[[int, float], None]) -> None:
        self.on_loss = on_loss
        self.start = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= time.perf_counter() - self.start > SECONDS

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.on_loss(state.global_step, logs["loss"])


def measure(model: Any, tokenizer: Any) -> Measured:
    losses = [answer_loss(model, tokenizer, chats(name)) for name in ("reworded", "heldout")]
    return Measured(*losses, tuple(answer(model, tokenizer, question) for question in QUESTIONS))


def chats(name: str) -> list[list[dict[str, str]]]:
    """The messages of each line of a bundled data set."""
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, rows: list) -> float:
    """The mean loss of a token of the answers."""
    total, count = 0.0, 0
    for messages in rows:
        chat = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, answered = torch.tensor(chat["input_ids"]), torch.tensor(chat["assistant_masks"]).bool()[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits[answered].float(), ids[1:][answered], reduction="sum").item()
        count += int(answered.sum())
    return total / count


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str) -> str:
    """What the model answers, always taking the likeliest token; "..." where it does not come to an end."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())
    return text if tokens[-1] in model.generation_config.eos_token_id else f"{text} ..."
