"""The checkable problems: rows, rewards and a score. `catalog` lists them, `base` says what a problem is."""
