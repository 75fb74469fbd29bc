"""Whether a sentence is acceptable (CoLA, arXiv 1805.12471): as sst2, but Matthews correlation comes first."""

from typing import Any

import numpy as np

from jaxlm.data import embedded, metrics
from jaxlm.data.sources import Source
from jaxlm.tasks.sst2 import Sst2


class Cola(Sst2):
    def embedded(self) -> Source:
        return embedded.sentences("cola")

    def scores(self, totals: Any) -> metrics.Scores:
        return {
            "matthews": metrics.matthews(np.asarray(totals["confusion"], np.float64)),
            "accuracy": metrics.accuracy(totals),
            "loss": metrics.loss(totals),
        }
