"""Modules beside this file are importable from every test."""
