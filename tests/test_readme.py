"""The README's Python example, run as it is written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def python_example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return block


@pytest.mark.filterwarnings("ignore")  # a user's Trainer, with Lightning's advice on workers, devices and loggers
def test_the_example_runs_in_a_users_own_trainer_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_source: Path
) -> None:
    from lightning_mmembed.data import ShardTexts, shard_dataset
    from lightning_mmembed.encoders.tiny import tiny_encoder

    monkeypatch.chdir(tmp_path)
    shard_dataset(tiny_source, "data/shards/mini")
    small = {"hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32, "vision_layers": 1, "vocab_size": 400}
    tiny_encoder("data/tiny/mini", ShardTexts("data/shards/mini"), small)
    names: dict[str, object] = {}
    exec(compile(python_example(), str(README), "exec"), names)
    assert names["trainer"].global_step > 0
    assert set(names["trainer"].callback_metrics) >= {"test/union/hit@5", "test/local/hit@5", "test/union/modality@1"}
    assert list(Path().rglob("metrics.json"))
    assert "tensor" in capsys.readouterr().out
