"""The report: page, charts, pictures."""
