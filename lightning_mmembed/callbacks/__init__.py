"""Callbacks: evaluation, hard-negative mining, report."""

from lightning_mmembed.callbacks.evaluation import RetrievalEvaluation as RetrievalEvaluation
from lightning_mmembed.callbacks.mining import HardNegativeMining as HardNegativeMining
from lightning_mmembed.callbacks.report import RunReport as RunReport
