"""A job becomes a tree of processes of our own, and a result comes back."""
