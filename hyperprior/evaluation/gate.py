"""Decides whether models are as good as in an earlier evaluation: `hyperprior evaluate --gate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hyperprior.errors import ConfigError

FORMAT = 1  # of summary.json


def read_stored(
    path: Path, out: Path, images: dict[str, str], models: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """For each model's name the stored point to compare it with: the point of the same metric and lambda.

    A model may thus be retrained, renamed or built differently. If several points fit, the one of the same name counts.
    The effort must be the same.

    `path`: the stored summary.json; `out`: the folder of the new one; `images`: SHA-256 by image name; `models`:
    metric, lambda and effort by model name. Raises ConfigError if the file, its images or its models do not fit.
    """
    if path.resolve() == (out / "summary.json").resolve():
        raise ConfigError(f"--gate {path} would be overwritten by the new result; choose another --out")
    try:
        summary = json.loads(path.read_text())
        before = {str(image["name"]): image["sha256"] for image in summary["images"]}
        points = [
            {
                **p,
                "point": str(p["point"]),
                "lambda": float(p["lambda"]),
                "metric": str(p["metric"]),
                "loss": float(p.get("loss") or 0.0),
                "effort": int(p.get("effort") or 0),
            }
            for p in summary["points"]
            if p["kind"] == "model"
        ]
        is_known = summary["format"] == FORMAT
    except Exception as error:  # a file of any content
        raise ConfigError(f"--gate {path} is not a summary.json of `hyperprior evaluate`: {error!r}") from error
    if not is_known:
        raise ConfigError(
            f"--gate {path} has format {summary['format']}; this version compares format {FORMAT}: "
            f"measure that model again"
        )
    if differing := sorted(name for name in before.keys() | images.keys() if before.get(name) != images.get(name)):
        raise ConfigError(
            f"--gate {path} was measured on other images: {len(differing)} differ or are missing on one side, "
            f"first {differing[0]}"
        )
    stored = {}
    for name, facts in models.items():
        finite = [p for p in points if 0 < p["loss"] < math.inf]
        fitting = [p for p in finite if all(p[k] == facts[k] for k in ("metric", "lambda", "effort"))]
        fitting = [p for p in fitting if p["point"] == name] if len(fitting) > 1 else fitting
        if len(fitting) != 1:
            held = ", ".join(f"{p['point']} ({describe_setting(p)})" for p in points) or "nothing"
            raise ConfigError(
                f"--gate {path} does not have exactly one result for {name} ({describe_setting(facts)}); it "
                f"holds {held}"
            )
        stored[name] = fitting[0]
    return stored


def describe_setting(facts: dict[str, Any]) -> str:
    effort = f", effort {facts['effort']}" if facts["effort"] else ""
    return f"{facts['metric']}, lambda {facts['lambda']:g}{effort}"


def judge_point(point: dict[str, Any], stored: dict[str, Any], margin: float) -> dict[str, Any]:
    """The verdict on a model: its loss on real files may exceed the stored loss by `margin` percent.

    The loss weighs rate and distortion, so a gain in one may make up for the other.
    """
    passed = point["loss"] <= stored["loss"] * (1.0 + margin / 100.0)
    change = 100.0 * (point["loss"] / stored["loss"] - 1.0)
    facts = {"point": point["point"], "loss": point["loss"], "stored_loss": stored["loss"]}
    return {**facts, "change_percent": change, "margin_percent": margin, "passed": passed}


def describe_verdict(verdict: dict[str, Any]) -> str:
    return (
        f"{verdict['point']} is {'as good' if verdict['passed'] else 'worse'}: loss {verdict['loss']:.4f}, stored "
        f"{verdict['stored_loss']:.4f} ({verdict['change_percent']:+.2f}%, margin {verdict['margin_percent']:g}%)"
    )
