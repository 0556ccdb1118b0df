"""Commands on what a registry holds."""
