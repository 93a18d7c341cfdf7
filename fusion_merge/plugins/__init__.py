"""What runs inside other programs: `NAME.py` is the only file that knows the names of the package `NAME`."""
