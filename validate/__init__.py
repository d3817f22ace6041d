"""Metrics, the error budget, benches and pictures."""
