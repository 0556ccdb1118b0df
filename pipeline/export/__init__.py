"""What leaves the registry: a plain directory, a repository on the hub, and the card of both."""
