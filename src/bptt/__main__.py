"""`python -m bptt` is `bptt`."""

from .cli import main

main()
