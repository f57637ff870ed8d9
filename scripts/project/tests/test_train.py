"""Trains on the sample for a few seconds."""

import json
import math

from train import Config, train


def test_it_trains(tmp_path):
    metrics = train(Config(data="sample", smoke=True, epochs=2, baseline=False, run_dir=str(tmp_path / "run")))
    assert all(math.isfinite(value) for value in metrics.values())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"] == metrics
    assert (tmp_path / "run" / "model.keras").exists()
