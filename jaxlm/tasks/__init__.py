"""The tasks by name. To add one: README.md beside this file."""

from jaxlm.tasks import glue
from jaxlm.tasks.base import Task
from jaxlm.tasks.classify import Classify
from jaxlm.tasks.cola import Cola
from jaxlm.tasks.embed import Embed
from jaxlm.tasks.gpt import Gpt
from jaxlm.tasks.mlm import Mlm
from jaxlm.tasks.multilabel import Multilabel
from jaxlm.tasks.pairs import Pairs
from jaxlm.tasks.regress import Regress
from jaxlm.tasks.sst2 import Sst2
from jaxlm.tasks.tag import Tag

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
