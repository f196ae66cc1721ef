"""A stand-in for llm-compressor."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


class Modifier:
    def __init__(self, **given: Any) -> None:
        self.given = given


class GPTQModifier(Modifier):
    pass


class QuantizationModifier(Modifier):
    pass


def install(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Has it imported instead. Returns what `oneshot` is then called with."""
    calls: dict[str, Any] = {}
    package, modifiers = ModuleType("llmcompressor"), ModuleType("llmcompressor.modifiers.quantization")
    package.oneshot = lambda **options: calls.update(options)
    modifiers.GPTQModifier, modifiers.QuantizationModifier = GPTQModifier, QuantizationModifier
    monkeypatch.setitem(sys.modules, "llmcompressor", package)
    monkeypatch.setitem(sys.modules, "llmcompressor.modifiers", ModuleType("llmcompressor.modifiers"))
    monkeypatch.setitem(sys.modules, "llmcompressor.modifiers.quantization", modifiers)
    return calls
