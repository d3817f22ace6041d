"""Which block, node or tensor is to blame for an error."""
