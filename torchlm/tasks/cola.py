"""Whether a sentence is acceptable (CoLA, arXiv 1805.12471); Matthews correlation comes first."""

from jaxlm.tasks import cola
from torchlm.tasks.classify import Classify


class Cola(Classify, cola.Cola):
    pass
