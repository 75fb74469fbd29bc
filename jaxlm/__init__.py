"""jaxlm: a compact BERT/GPT trainer in JAX and Flax.

    loop.py         the training loop of the command `python -m jaxlm.train`; start reading here
    step.py         one optimizer update, as a pure function; loss.py has the loss
    model.py        the transformer; heads.py puts an output layer on it, products.py has what both multiply with,
                    fused.py attention in one kernel
    parallel.py, distributed.py
                    devices and processes that work as one; rendezvous.py lets processes meet; SHARDING.md is the guide
    tasks/          what is trained: mlm, gpt, sst2, cola, pairs; one file each
    data/           text -> articles -> tokens -> samples -> batches (no JAX in it)
    config.py       every setting, with its default, range and unit
    schedule.py, optim.py, checkpoint.py, generate.py, backend.py, trace.py
    distill.py      the loss of a student; teacher.py finds whom it learns from; TUNING.md tells it to people
    start.py        what a run starts from; CHECKPOINTS.md tells it to people
    train.py, run.py, log.py, history.py, checksums.py, metrics.py, errors.py, chips.py, flops.py, hugepages.py
                    (no framework in them)
    utf8.py, terminal.py
                    how all text is read, and shown on terminals
    storage.py, temporary.py
                    where files lie, and how they get their names when they are whole
    predict.py, evaluate.py
                    the commands that use a trained model; USING.md tells them to people. trained.py loads the model,
                    decode.py continues prompts
    serve.py        the command that serves one; SERVE.md tells it to people. api.py has its addresses and limits,
                    engine.py the thread that answers many at once, serve.html the page, attention.py what it shows
    plan.py         the command that tells memory, time and cost of a training before it; ahead.py compiles its step,
                    hlo.py reads what that sends and moves, roofline.py has the figures; PLAN.md tells it to people
    runs.py, report.py
                    the commands that look after runs, and draw them; folder.py reads what they tell, page.py has the
                    pieces of a page, environment.py what a run was made with
    convert.py      the command that turns checkpoints into those of torchlm, the original, or safetensors, and back;
                    formats.py reads and writes them, public.py models of transformers, names.py has the rules for names
                    and layouts, tune.py says what is trained

Array names end in their shape, in these letters:
    B batch, T positions, D d_model, H heads, K head size, F feed-forward, V vocabulary, L layers,
    M masked positions per sample, C classes, A accumulated batches, W window length.
"""
