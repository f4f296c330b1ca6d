"""Train and evaluate: ``python train.py [key=value ...]``; the same program as ``mmembed-train``."""

from lightning_mmembed.cli import train_main

if __name__ == "__main__":
    train_main()
