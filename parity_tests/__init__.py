"""A tool that proves ports equal, and the proof that jaxlm, torchlm and the original design compute the same numbers.

The tool is for any model, and is in the wheel. It imports NumPy, the framework that it records, and of jaxlm only what
imports neither (errors, io, reporting):

    record/          records a run of PyTorch or JAX
    compare/         `python -m parity_tests.compare A B`: compares two runs
    carry.py         start values and batches of one run for the other
    pytest_plugin.py a fixture, and `pytest --parity FOLDER`
    PROVE_A_PORT.md  how to use it

All else is the project's own cases, which are not in the wheel:

    replay.py        `python -m parity_tests.replay CASE_DIR...`: recorded cases in both packages; start reading here
    case.py          a recorded case: a folder of `cases/`, or another one of that form
    plan.py          what both packages are to do: settings, start weights, batches
    packages.py      jaxlm and torchlm behind one interface: NumPy in, NumPy out, torchlm's names
    trajectory.py    all that a package computes of a plan, and rows of how far two of these are apart
    rounding.py      what rounding does, which compare/tolerances.py goes by
    drift.py         float64, dropout and bfloat16 over many updates
    inputs.py        long, padded and extreme inputs, and every optional setting of the model
    packed.py        packed rows against the same documents unpacked
    mixture.py       the order of several sources, and the loss of each, against plain counts
    references.py    PyTorch's own attention, layers and optimizer, NumPy, transformers, finite differences
    families.py      recorded models of transformers with the modern block, over 12 updates (family_cases/)
    checks.py        all checks by name; checks_test.py asserts that they pass
    original.py      the original once more, to record further cases
    randomness.py    start values, and the seeds of dropout
    faults/          `python -m parity_tests.faults`: planted mistakes, and which check catches each;
                     `python -m parity_tests.faults.diagnosis`: what the tool says of each
    report.py        `python -m parity_tests.report`: a page of all this

Every check is a function that returns rows; tests assert that each row passes.
"""

import os

# Threads that spin while they wait starve each other beside other programs; read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
