"""Methods: one file each. A new one is a file here, a YAML in config/method/, and a test."""
