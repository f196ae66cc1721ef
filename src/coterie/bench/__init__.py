"""Measurements beside Transformers' own experts, taking turns in one process."""
