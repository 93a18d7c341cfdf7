"""Merging by the median: a method of fusion_merge in a package of its own."""
