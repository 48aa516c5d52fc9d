"""Progressive training: alignment pretraining, single-reference finetuning, multi-reference finetuning.

Modules in reading order (B groups, K references in each, T reference tokens):

    stages.py        the three stages as data: trained parameters and starting point
    config.py        YAML and key=value -> Settings, one per stage
    rows.py          reader and validator of the authors' JSON rows
    crops.py         crops, face boxes, native aspect
    examples.py      a row and a random generator -> one Sample
    broken_rows.py   rows skipped while training, counted over all processes
    parquet_shards.py  rows and their images in Parquet shards, local or at a URL
    stream_order.py  position -> partition, block, row, in shuffled epochs of several sources
    stream.py        shards -> Samples, in batches of one size
    batches.py       Samples -> a Batch; the endless shuffled stream of positions

    base_files.py    files of a base: a diffusers folder or a single-file checkpoint
    base_model.py    its frozen UNet, VAE, text encoders and noise schedule
    objective.py     the loss of a noise schedule (epsilon, v-prediction, sample), and its sampler
    initial.py       initial weights of a run
    trainable.py     Batch -> reference tokens (B, T, C) -> prediction (B, 4, h, w), with gradients
    optimizers.py    AdamW, 8-bit AdamW, Adafactor
    sharding.py      weights that FSDP and DeepSpeed shard over the processes
    ema.py           moving average of the trained weights
    run.py           one stage in training: one update, and the checkpoint
    validation.py    loss at fixed timesteps on held-out rows
    signals.py       SIGTERM ends a run after its update
    throughput.py    samples per second, waiting for data
    profiling.py     a trace of some updates
    loop.py          all updates
    export.py        a saved state -> a checkpoint
    shards.py        entries of tensors in safetensors files
    precomputed.py   the frozen models' outputs in shards, in place of the models
    precompute.py    writes them
    cache.py         disk cache of VAE moments and context states
    resume.py        saved states; a killed run resumes bit for bit
    run_log.py       progress bar, metrics.csv, accelerate's trackers, sheets of sample images
    sampling.py      image generation with guidance

    full_size.py     full-size models on the meta device
    counting.py      FLOPs and peak memory there
    memory.py        memory of a run, compared with the device's
    cost.py          memory and time of each stage at full size

launch/ has configurations and scripts that start it on one or many GPUs.

Nothing is imported here, because the nodes need none of it.
"""
