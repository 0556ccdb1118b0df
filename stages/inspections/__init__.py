"""Jobs whose answer is shown and never published: preflight, inspect, probe, score."""
