"""Stores of a registry's bytes: a local disk, or an object store."""
