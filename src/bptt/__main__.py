"""`python -m bptt` is `bptt`."""

from .cli import main

if __name__ == "__main__":  # not in a worker process that imports it anew
    main()
