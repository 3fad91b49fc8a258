"""fastres for Ray Data: ``Predictor``. All of predicting on a cluster: ``fastres.predict(..., engine="ray")``."""

from fastres.pipelines.cluster import Predictor

__all__ = ["Predictor"]
