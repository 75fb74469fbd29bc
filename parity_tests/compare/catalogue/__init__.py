"""What goes wrong in ports, by where two runs part. Each file has RULES, a table of what may cause a first divergence.

A rule gets a Divergence and yields the causes that the numbers speak for. Most compute an array again, by the formulas
that its place allows, and tell what differs between the formula of A and that of B.

evidence.py      causes, formulas, and when one explains an array       divergence of two arrays: place.py
start.py         start values and batches          forward.py     activations: what any two arrays tell
modules.py       formulas of one module            composed.py    formulas of several arrays before
attention.py     settings of attention             embedding.py   tokens and positions
loss.py          losses and metrics                gradient.py    gradients
optimizer.py     moments and updates               muon.py        updates of Muon
rate.py          learning rates
"""
