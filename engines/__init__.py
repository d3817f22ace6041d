"""Targets, building, manifests and running of engines."""
