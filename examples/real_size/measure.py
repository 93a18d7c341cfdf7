"""Run a command, and print how long it took and the most memory that it had at a time.

Usage: python measure.py COMMAND …
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time


def main() -> int:
    """Run the command of this process's arguments; return its exit code."""
    if len(sys.argv) < 2:
        print("usage: python measure.py COMMAND …", file=sys.stderr)
        return 2
    start = time.perf_counter()
    code = subprocess.run(sys.argv[1:], check=False).returncode
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # of the largest process, in bytes
    print(
        f"seconds {seconds:.1f}, of processor {usage.ru_utime + usage.ru_stime:.1f}, peak memory {peak / 1e9:.2f} GB",
        file=sys.stderr,
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
