"""Choosing blocks, heads and landmarks for a fidelity and a device."""
