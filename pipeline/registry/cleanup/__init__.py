"""Garbage collection: what is needed, what is removed, and what removals left behind."""
