"""The model card of an encoder, and its way to the hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, errors

from lightning_mmembed.errors import UserInputError

if TYPE_CHECKING:
    from lightning_mmembed.encoders.mllm import MLLMEncoder

TEMPLATE = Path(__file__).with_name("card.md.j2")
TAGS = ("multimodal-retrieval", "embeddings", "image-text-retrieval")

#: What the hub's client raises; its HTTP library, whose error of a lost connection this is, differs by version.
_HUB_ERRORS = (OSError, errors.HFValidationError, errors.HTTPError)  # type: ignore[attr-defined]

#: What the stages of training are, by the names that the package gives them.
STAGES = {
    "random": "contrastive, with the other queries' candidates as negatives",
    "hard": "contrastive, with mined hard negatives beside those",
    "continual": "multimodal and text-to-text data mixed, at a low learning rate",
}


def model_card(
    encoder: MLLMEncoder,
    name: str,
    *,
    license: str | None = None,
    base_model: str | Sequence[str] | None = None,
    training_data: Sequence[str] = (),
    stages: Sequence[str] = (),
    metrics: str | Path | Mapping[str, Any] | None = None,
) -> ModelCard:
    """Write the model card of an encoder; ``model_card(...).save(directory / "README.md")`` puts it beside the weights.

    What is not given is said to be not stated.

    Args:
        encoder: The encoder.
        name: Its hub id or directory, as users are to load it.
        license: Identifier of the hub, such as ``"apache-2.0"``.
        base_model: Hub ids of what it was trained from; by default what it was loaded from, if that was the hub.
        training_data: Names of the data, or sentences on them.
        stages: ``"random"``, ``"hard"``, ``"continual"`` or a sentence each, in their order.
        metrics: What ``mmembed-evaluate`` wrote, ``metrics.json`` or its content.

    Raises:
        UserInputError: If ``metrics`` is none of that.
    """
    if base_model is None and encoder.base is not None and encoder.base["revision"] is not None:
        base_model = encoder.base["path"]  # from the hub
    data = ModelCardData(
        library_name="lightning-mmembed",
        pipeline_tag="feature-extraction",
        tags=list(TAGS),
        license=license,
        base_model=base_model if base_model is None or isinstance(base_model, str) else list(base_model),
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        base_models=[base_model] if isinstance(base_model, str) else list(base_model or ()),
        settings={**encoder.settings, "dimension": encoder.embedding_dim},
        backbone=type(encoder.backbone).__name__,
        parameters=f"{sum(parameter.numel() for parameter in encoder.parameters()):,}",
        training_data=list(training_data),
        stages=[f"{stage}: {STAGES[stage]}" if stage in STAGES else stage for stage in stages],
        **({} if metrics is None else _evaluation(metrics)),
    )
    return card


def _evaluation(metrics: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """What the template says of ``metrics.json``: rows of (task, metric, figure by pool), and the protocol.

    A path says nothing to others, and something of the machine: of the checkpoint's, only the file's name is given.
    """
    try:
        content = metrics if isinstance(metrics, Mapping) else json.loads(Path(metrics).read_text())
        pools = [pool for pool in ("union", "local") if pool in content]
        headlines = {pool: content[pool]["headline"] for pool in pools}
        first = headlines[pools[0]]
        rows = [
            (task, row["metric"], [_percent(headlines[pool]["tasks"].get(task)) for pool in pools])
            for task, row in first["tasks"].items()
        ]
        groups = [
            (group, "", [_percent(headlines[pool].get(group)) for pool in pools]) for group in first if group != "tasks"
        ]
        protocol = dict(content["protocol"])
        if "checkpoint" in protocol:
            protocol["checkpoint"] = Path(protocol["checkpoint"]).name
        return {"pools": pools, "rows": rows + groups, "protocol": protocol}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        given = "the mapping" if isinstance(metrics, Mapping) else repr(str(metrics))
        raise UserInputError(
            f"metrics={given} is not what mmembed-evaluate writes ({type(error).__name__}: {error}); give the "
            "metrics.json of an evaluation"
        ) from error


def _percent(figure: Mapping[str, float] | None) -> str:
    """A share with its 95 % interval, in per cent; a dash where there is none."""
    if figure is None:
        return "-"
    value, low, high = (f"{100 * figure[name]:.1f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def push(encoder: MLLMEncoder, repo_id: str, private: bool, token: str | None, card: Mapping[str, Any]) -> str:
    """Upload an encoder with its card; see :meth:`MLLMEncoder.push_to_hub`."""
    written = model_card(encoder, repo_id, **card)
    api = HfApi(token=token)
    try:
        # First, so that a wrong name or token is known before gigabytes are written.
        whole_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if whole_id != repo_id:  # an organization was left out
            written = model_card(encoder, whole_id, **card)
        with tempfile.TemporaryDirectory() as folder:
            directory = encoder.save_pretrained(Path(folder) / "encoder")
            written.save(directory / "README.md")
            commit = api.upload_folder(repo_id=whole_id, folder_path=directory, commit_message="Upload the encoder")
        return str(commit.commit_url)
    except _HUB_ERRORS as error:
        raise UserInputError(
            f"repo_id={repo_id!r} cannot be pushed to the hub: {error}. Check the name, the connection and the token "
            "(hf auth login), or save_pretrained to a directory and upload that"
        ) from error
