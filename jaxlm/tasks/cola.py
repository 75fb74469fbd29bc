"""Whether a sentence is acceptable (CoLA, arXiv 1805.12471); Matthews correlation comes first."""

from jaxlm.data import embedded
from jaxlm.data.sources import Source
from jaxlm.tasks.classify import Classify


class Cola(Classify):
    scored = ("matthews", "accuracy")

    def embedded(self) -> Source:
        return embedded.sentences("cola")
