"""Whether a sentence of a review is positive (SST-2, arXiv 1804.07461)."""

from jaxlm.tasks import sst2
from torchlm.tasks.classify import Classify


class Sst2(Classify, sst2.Sst2):
    pass
