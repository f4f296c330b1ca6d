"""Evaluate a checkpoint: ``python evaluate.py ckpt_path=...``; the same program as ``mmembed-evaluate``."""

from lightning_mmembed.cli import evaluate_main

if __name__ == "__main__":
    evaluate_main()
