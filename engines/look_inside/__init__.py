"""What an engine holds, and its tensors while it runs."""
