"""Exports from the registry: to a plain directory or to a repository on the hub, with a card."""
