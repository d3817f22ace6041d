"""Whether the model still does its job."""
