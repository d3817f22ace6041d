"""Deployment bundles: format, writing, and what lies in them."""
