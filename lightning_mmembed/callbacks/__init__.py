"""Callbacks: evaluation, hard-negative mining, preemption, report, watchdog."""

from lightning_mmembed.callbacks.evaluation import RetrievalEvaluation as RetrievalEvaluation
from lightning_mmembed.callbacks.mining import HardNegativeMining as HardNegativeMining
from lightning_mmembed.callbacks.preemption import PreemptionCheckpoint as PreemptionCheckpoint
from lightning_mmembed.callbacks.report import RunReport as RunReport
from lightning_mmembed.callbacks.watchdog import Watchdog as Watchdog
