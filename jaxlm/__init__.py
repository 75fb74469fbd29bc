"""jaxlm: a compact BERT/GPT trainer in JAX and Flax.

Read `loop.py` first, then `step.py`, `loss.py`, `model.py`, `heads.py` and `tasks/`: an update from the command to the
matmul. `torchlm` mirrors the files at the top, under the same names and in the same order. Each folder has a
README.md that says what is in it; `scripts/structure.py` has the order in which they import each other.

Types that describe runs and checkpoints:

    Run               one training: settings, task, data, folder, log                       training/run.py
    Start             what a run starts from: nothing, a run to resume, a base model        training/resume.py
    Teacher           the model to distil                                                   training/teacher.py
    TrainState        parameters, optimizer state and step, on the devices                  step.py
    Checkpoints       saves and restores the checkpoints of a run                           checkpoint.py
    Snapshot          a training state as NumPy arrays, checked against its settings        params/snapshot.py
    StoredFile        the content of a file or folder of any format, unchecked              weights/formats.py
    LoadedModel       a model with its settings and tokenizer, ready to use                 inference/load.py
    RunRecord         the content of a run folder, for reports                              reporting/run_reader.py
    CheckpointRecord  one checkpoint in it                                                  reporting/run_reader.py

Array names end in their shape, in these letters:
    B batch, T positions, D d_model, H heads, K head size, F feed-forward, V vocabulary, L layers,
    M masked positions per sample, C classes, A accumulated batches, W window length.
"""
