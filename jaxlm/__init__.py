"""jaxlm: a compact BERT/GPT trainer in JAX and Flax.

    train.py        the command `python -m jaxlm.train` and the training loop; start reading here
    step.py         one optimizer update and one evaluation step, as pure functions
    model.py        the transformer; heads.py puts an output layer on it
    tasks/          what is trained: mlm, gpt, sst2, cola; one file each
    data/           text -> articles -> tokens -> samples -> batches (no JAX in it)
    config.py       every setting, with its default, range and unit
    schedule.py, optim.py, parallel.py, checkpoint.py, log.py, generate.py, errors.py

Array names end in their shape, in these letters:
    B batch, T positions, D d_model, H heads, K head size, F feed-forward, V vocabulary, L layers,
    M masked positions per sample, C classes, A accumulated batches, W window length.
"""
