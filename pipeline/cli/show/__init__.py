"""What commands print: tables, progress, loss maps."""
