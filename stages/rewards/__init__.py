"""From the reward components of an answer to the one number that is trained on, and an audit of what they pay for."""
