"""Recipe and registry -> steps with keys: which are reused, which run, and why."""
