"""CLIP vision towers: reading them, and the merged model."""
