"""Experts beside a model that lives on a GPU."""
