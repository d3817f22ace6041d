"""Writing FNA into a graph."""
