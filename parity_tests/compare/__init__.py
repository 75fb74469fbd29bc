"""Compares two training runs, of any model and framework. Needs NumPy only.

command.py       `python -m parity_tests.compare A B`
arrays.py        runs that the user has written as arrays
rows.py          measured differences       tolerances.py    how large they may be, and why
page.py          pages
"""
