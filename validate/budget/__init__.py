"""The error budget: the chain of models, and how far each is from the one before."""
