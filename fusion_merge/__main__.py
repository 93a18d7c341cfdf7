"""`python -m fusion_merge` is the command line."""

from fusion_merge.cli import main

main()
