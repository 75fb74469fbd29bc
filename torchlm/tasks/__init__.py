"""The tasks by name. To add one: jaxlm/tasks/README.md, then a file beside this one that overrides what uses JAX."""

from jaxlm.tasks import glue
from torchlm.tasks.base import Task
from torchlm.tasks.classify import Classify
from torchlm.tasks.cola import Cola
from torchlm.tasks.embed import Embed
from torchlm.tasks.gpt import Gpt
from torchlm.tasks.mlm import Mlm
from torchlm.tasks.multilabel import Multilabel
from torchlm.tasks.pairs import Pairs
from torchlm.tasks.regress import Regress
from torchlm.tasks.sst2 import Sst2
from torchlm.tasks.tag import Tag

TASKS: dict[str, type[Task]] = {
    "mlm": Mlm,
    "gpt": Gpt,
    "sst2": Sst2,
    "cola": Cola,
    "pairs": Pairs,
    "tag": Tag,
    "embed": Embed,
    "classify": Classify,
    "multilabel": Multilabel,
    "regress": Regress,
    **glue.tasks(Classify, Regress),
}
