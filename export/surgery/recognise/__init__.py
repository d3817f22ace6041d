"""Finding attention in a graph, and deciding what FNA can stand for."""
