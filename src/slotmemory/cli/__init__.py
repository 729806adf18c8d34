"""The command line. Its entry imports nothing heavy, so that Ctrl-C is answered from the first moment.

Every mistake of a person becomes one line on stderr and exit status 2; every stop tells what was kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 a fault of ours, 2 a mistake in what was given, 130 or 143 stopped."""
    try:
        from slotmemory.cli.signals import Signals, Stopped

        words = list(sys.argv[1:] if arguments is None else arguments)
        with Signals():
            try:
                from slotmemory.cli.app import run

                status = run(words)
            except Stopped as stopped:
                _say(stopped.message)
                status = 128 + stopped.number
    except KeyboardInterrupt:
        _say("stopped before anything was made")
        status = 130
    sys.exit(status)


def _say(line: str) -> None:
    print(f"slotmemory: {line}", file=sys.stderr, flush=True)
