"""A world small enough to train EasyRef in on a laptop, and the model that was trained in it and ships with the pack.

In reading order:

    pictures.py        five independent attributes -> a picture of 64 pixels, and the caption that names some of them
    groups.py          groups that share some attributes and vary the others; which combinations are held out
    pool.py            the pictures of a training, drawn once
    words.py           tokenizers whose words are those of the captions
    codec.py           the latent codec, an AutoencoderKL: 64 x 64 pixels <-> (4, 8, 8)
    painter.py         the tiny SDXL: a UNet of its shape and two CLIP text encoders, pretrained on captions
    reader.py          the tiny Qwen2-VL, pretrained to describe pictures and to compare them
    classifier.py      the judge, which reads the attributes off a picture
    recipe.py          all that in order, with every size and seed: what stands for SDXL and Qwen2-VL
    examples.py        the groups as examples for the three stages (easyref_core/training)
    evaluate.py        held-out groups, painted and judged
    demo_group.py      numbered groups to show
    clip.py, single_pictures.py, baselines.py    what MRBench compares with, trained in the same world

weights/ holds what `make tiny` made: base/ (a diffusers SDXL folder), tiny-qwen2-vl/ (config and tokenizer),
tiny_easyref.safetensors (the third stage's checkpoint, the MLLM in it) and the judge.
"""
