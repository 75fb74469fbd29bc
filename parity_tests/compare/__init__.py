"""Compares two training runs, of any model and framework. Needs NumPy only.

    report = compare.runs(a, b)                  # two records of parity_tests.record
    print(report.text())                         # where they part first, and the likeliest causes
    compare.assert_same_training(a, b)           # in a test

command.py       `python -m parity_tests.compare A B`
verdict.py       the comparison of two records and its result
pairing.py       which parameter and module of one is which of the other
divergence.py    differences in the order of execution, their tolerances, and what cannot be seen
diagnose.py      the likeliest causes     catalogue/    what goes wrong, by where
arrays.py        runs that the user has written as arrays
rows.py          measured differences       tolerances.py    how large those of arrays.py may be, and why
page.py          pages
"""

from parity_tests.compare.verdict import Verdict, assert_same_training, runs

__all__ = ["Verdict", "assert_same_training", "runs"]
