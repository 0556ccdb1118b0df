"""Commands that start runs, go on with them, and show them."""
