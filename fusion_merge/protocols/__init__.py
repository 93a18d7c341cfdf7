"""Ways to run and score more than once: one file a protocol."""
