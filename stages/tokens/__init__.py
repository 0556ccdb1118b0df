"""From messages to token rows: the chat template, the response prefix, a role for every token, and the loss weight of
each role."""
