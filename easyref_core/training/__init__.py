"""Progressive training: alignment pretraining, single-reference finetuning, multi-reference finetuning.

The flow, in reading order (B groups, K references in each, T reference tokens):

    stages.py        the three stages as data: what each trains and what it starts from
    config.py        YAML and key=value -> Settings, one for each stage of a run
    rows.py          the authors' JSON rows, checked before the run
    framing.py       crops, face boxes, native aspect
    examples.py      a row and a random generator -> one Sample
    batches.py       Samples -> a Batch; the endless shuffled stream they are taken from

    base_model.py    the frozen half: UNet, VAE, text encoders, noise schedule, from a diffusers SDXL folder
    initial.py       the weights a run starts from
    trainable.py     Batch -> reference tokens (B, T, C) -> predicted noise (B, 4, h, w), with gradients
    run.py           a stage being trained: one update, and the checkpoint it leaves
    loop.py          all updates
    cache.py         latents and context states that need not be computed twice
    resuming.py      saved states; a killed run continues exactly
    records.py       progress bar, metrics.csv, TensorBoard, sheets of sample pictures
    painting.py      pictures from the base model, with guidance

    cost.py          memory and time of each stage at full size, counted

Nothing is imported here: the nodes never need any of it.
"""
