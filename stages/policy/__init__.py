"""Policies: where they lie, how they are loaded, and the adapters that are trained on them."""
