"""Zero-shot reranking: a multimodal LLM is asked, pair by pair, whether a candidate is what a query looks for."""

from lightning_mmembed.rerank.order import fused as fused
from lightning_mmembed.rerank.order import rerank as rerank
from lightning_mmembed.rerank.order import settled as settled
from lightning_mmembed.rerank.runs import Estimate as Estimate
from lightning_mmembed.rerank.runs import RunScores as RunScores
from lightning_mmembed.rerank.runs import estimate as estimate
from lightning_mmembed.rerank.runs import score_run as score_run
from lightning_mmembed.rerank.store import ScoreStore as ScoreStore
from lightning_mmembed.rerank.zero_shot import ZeroShotReranker as ZeroShotReranker
