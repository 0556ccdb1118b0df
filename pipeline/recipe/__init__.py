"""What the user wrote, validated and frozen, and what can be judged of it without a GPU."""
