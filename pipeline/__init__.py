"""Pipeline: decides, remembers, reports. It never touches a tensor, a tokenizer or user code, and imports of `stages`
only what is cheap."""
