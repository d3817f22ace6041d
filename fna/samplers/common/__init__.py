"""What samplers share: their record, spacing, masks and roles, weights."""
