"""Transformers' OpenAI-compatible server over models that are loaded already."""
