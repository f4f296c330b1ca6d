"""Instructions for text-to-text datasets, which bring none: what is asked for, in this project's own words."""

from __future__ import annotations

#: By name of the dataset, as BEIR and the training sets of text embedders call it.
PROMPTS: dict[str, tuple[str, ...]] = {
    "arguana": ("Find the text that argues best against this argument.",),
    "bioasq": ("Find the text of a medical paper that answers the question.",),
    "climate-fever": ("Find the text that supports or refutes this claim about the climate.",),
    "cqadupstack": ("Find the text of a question in a forum that asks the same.",),
    "dbpedia-entity": ("Find the text that describes an entity which the query is about.",),
    "fever": ("Find the text that supports or refutes this claim.",),
    "fiqa": ("Find the text of an answer to this question about money.",),
    "hotpotqa": ("Find the texts that together answer the question.",),
    "msmarco": ("Find the text of a web page that answers the query.",),
    "nfcorpus": ("Find the text of a medical paper that answers the question about health.",),
    "nli": ("Find the text that follows from this sentence.",),
    "nq": ("Find the text of an encyclopedia that answers the question.",),
    "paq": ("Find the text of an encyclopedia that answers the question.",),
    "quora": ("Find the text of a question that asks the same.",),
    "scidocs": ("Find the text of a paper that this paper would cite.",),
    "scifact": ("Find the text of a paper that supports or refutes this claim.",),
    "squad": ("Find the text that holds the answer to the question.",),
    "stackexchange": ("Find the text of a post in a forum that answers this one.",),
    "trec-covid": ("Find the text of a paper that answers the question about the pandemic.",),
    "webis-touche2020": ("Find the text of an argument on this question.",),
    "wordnet": ("Find the text that says what this word means.",),
}

#: Of any other.
DEFAULT_PROMPTS = (
    "Find the text that answers the query.",
    "Which text is the query about? Find it.",
    "Find a text that tells what the query asks for.",
)


def prompts_for(dataset: str) -> tuple[str, ...]:
    """The prompts of a dataset.

    Example:
        >>> prompts_for("squad")
        ('Find the text that holds the answer to the question.',)
    """
    return PROMPTS.get(dataset, DEFAULT_PROMPTS)
