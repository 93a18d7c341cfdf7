"""What a run will do and need, told from configurations and file headers alone."""
