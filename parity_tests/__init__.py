"""Proof that jaxlm computes what the original design computes. `cases/` holds what the original recorded.

A case has `case.json` (settings; per update lr, loss, grad_norm before clipping) and `arrays.npz`: `init/NAME` and
`final/NAME` weights under the original's names, `x`, `y` batches in order, `logits0`, `loss0` and `grad0/NAME` of
batch 0 at the start values, and `eval_*` of the final weights on the last batch. Float32, dropout 0, on a CPU.
"""
