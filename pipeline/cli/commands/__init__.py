"""The commands, a folder for each noun: a recipe, a run, the registry. Each module adds its own to the app."""
