"""Commands that look at a recipe, and run none of it."""
