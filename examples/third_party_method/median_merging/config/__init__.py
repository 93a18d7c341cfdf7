"""Presets: this file only makes the folder a package, so that they are found wherever it is installed."""
