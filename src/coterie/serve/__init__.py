"""Talking to a model: on a terminal, and over HTTP."""
