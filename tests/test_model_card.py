"""The model card and its results are of the weights that are shipped, and say whether they reach what was wanted."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from moe3d_deploy.benchmarks import quality
from moe3d_deploy.shipped_weights import shipped_weights

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARD = ROOT / "docs" / "model_card.md"
PICTURES = ROOT / "docs" / "model_card"


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}_tiny.json").read_text(encoding="utf-8"))


def shipped_digest() -> str:
    weights = shipped_weights("moe3d-tiny")
    assert weights is not None
    return weights.sha256


def test_quality_was_measured_on_the_shipped_weights() -> None:
    assert result("quality")["model"]["sha256"] == shipped_digest()


def test_heads_were_compared_on_the_features_of_the_shipped_weights() -> None:
    assert result("heads")["model"]["sha256"] == shipped_digest()


@pytest.mark.parametrize("row", result("quality")["quality"], ids=lambda row: row["split"])
def test_the_bars_are_judged_by_the_means_beside_them(row: dict[str, Any]) -> None:
    better = {"abs_rel": -1, "delta1": 1, "auc30": 1}
    for key, bar in quality.BARS.items():
        mean = row["metrics"][key]["mean"]
        assert row["bars"][key] == {"bar": bar, "reached": better[key] * mean >= better[key] * bar}


def test_every_precision_was_judged_and_is_within_its_limits() -> None:
    rows = result("quality")["deployment"]
    assert {row["precision"] for row in rows} == {"fp32", "fp16", "bf16", "int8"}
    assert [row for row in rows if not row.get("within_limits")] == []


@pytest.mark.parametrize("path", sorted(PICTURES.rglob("*.png")), ids=lambda path: path.name)
def test_the_pictures_of_the_card_are_shown_and_not_empty(path: Path) -> None:
    assert str(path.relative_to(CARD.parent)) in CARD.read_text(encoding="utf-8")
    picture = cv2.imread(str(path))
    assert picture is not None
    assert np.unique(picture.reshape(-1, 3), axis=0).shape[0] > 100
