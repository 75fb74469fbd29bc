"""The tasks of GLUE (arXiv 1804.07461) beside SST-2 and CoLA: two texts each, by the metrics that GLUE has for them.

How their files and columns are called is in data/parts.py, and their settings are in configs/glue.toml.
"""

from typing import Any

SCORED = {  # of metrics.OF_CLASSES, the most telling first; stsb has those of Regress
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": (),
    **dict.fromkeys(("mnli", "qnli", "rte", "wnli"), ("accuracy",)),
}


def tasks(classify: Any, regress: Any) -> dict[str, Any]:
    """Return the tasks by name, made of the two general ones."""
    return {
        name: type(name.capitalize(), (classify if scored else regress,), {"scored": scored})
        for name, scored in SCORED.items()
    }
