"""What an audit found about a model's explanations: how concise they are, and how stable."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ExplanationFinding(BaseModel):
    """Integrated gradients of the right class's logit at the first records; one number for each of them, in order.

    Attributes:
        steps: of the midpoint sum.
        gini: of the absolute attributions of all pixels: 0 if all count alike, near 1 if few do.
        gini_lit: the same over pixels that are not black. Against a black baseline a black pixel has attribution 0,
            so that pictures with much black look concise whatever the model. 0 for an all black picture.
        overlap: share of the tenth of pixels with the largest attributions that keeps its place when the input moves
            to a random point of the threat set.
        unaccounted: | sum of attributions - change of the logit | / | change of the logit |, as a median over records:
            above 0.01 the sum is too coarse for this model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    steps: int
    gini: tuple[float, ...]
    gini_lit: tuple[float, ...]
    overlap: tuple[float, ...]
    unaccounted: float
    seconds: float
