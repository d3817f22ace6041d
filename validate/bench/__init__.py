"""Speed: models, kernels and engines, exact against FNA."""
