"""The countdown problem: reach a number with the given ones."""
