"""Whether a sentence is acceptable (CoLA, arXiv 1805.12471): as sst2, but Matthews correlation comes first."""

from jaxlm.tasks import cola
from torchlm.tasks.sst2 import Sst2


class Cola(Sst2, cola.Cola):
    pass
