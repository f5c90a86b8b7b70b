"""The `bptt` command, one file per subcommand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["main"]

NEEDS = ("typer", "rich", "safetensors", "tomli_w")
"""What the extra `bptt[cli]` installs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (default: the process's own arguments) and exit with its status.

    0: done. 1: a check failed, or training stopped at a loss that is not finite. 2: something given cannot be used.
    128 + n: stopped by signal n, with everything saved (130: Ctrl-C).
    """
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        print(f"bptt: error: {', '.join(missing)} not installed: pip install 'bptt[cli]'", file=sys.stderr)
        sys.exit(2)
    try:
        from .app import run

        status = run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("bptt: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
