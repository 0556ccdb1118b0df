"""Output of the commands: tables, progress, loss maps."""
