"""Whether a sentence of a review is positive (SST-2, arXiv 1804.07461)."""

from jaxlm.data import embedded
from jaxlm.data.sources import Source
from jaxlm.tasks.classify import Classify


class Sst2(Classify):
    def embedded(self) -> Source:
        return embedded.sentences("sst2")
