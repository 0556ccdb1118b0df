"""The rows that a stage trains on: where they come from, which rollouts are kept, and what is written of them."""
