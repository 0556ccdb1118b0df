"""User code runs in processes that can be killed, and a failure costs one answer."""
