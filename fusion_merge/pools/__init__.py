"""Model pools, task pools and datasets."""
