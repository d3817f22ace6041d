"""Serving files and engines."""
