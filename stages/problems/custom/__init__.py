"""Problems of the user: a Python file, or a dataset with reward functions. Their code runs in the guard."""
