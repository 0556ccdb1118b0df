"""A run of a plan, step after step, and the inspections that come before it."""
