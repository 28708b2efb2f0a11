"""Rates in files: their counts, with value and exact interval spelled out for readers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from trivet.statistics import Rate


def _written(rate: Rate) -> dict[str, Any]:
    counts = {"successes": rate.successes, "trials": rate.trials, "confidence": rate.confidence}
    return {**counts, "value": rate.value, "interval": list(rate.interval)}


def _read(value: Any) -> Any:
    """The counts alone: value and interval are written for readers of the file and follow from them."""
    if isinstance(value, dict):
        return {key: each for key, each in value.items() if key not in ("value", "interval")}
    return value


def _possible(rate: Rate) -> Rate:
    if not (0 <= rate.successes <= rate.trials and 0 < rate.confidence < 1):
        raise ValueError(f"{rate.successes} of {rate.trials} at confidence {rate.confidence} is no rate")
    return rate


Counted = Annotated[Rate, BeforeValidator(_read), AfterValidator(_possible), PlainSerializer(_written)]
"""A rate; in JSON with its value and its exact interval spelled out."""
