"""A procedural dataset on which EasyRef trains on a laptop, and the tiny model trained on it.

In reading order:

    images.py              five independent attributes -> an image of 64 pixels, and its caption
    groups.py              groups that share some attributes and vary the others; held-out combinations
    dataset.py             the images of a training, rendered once
    tokenizer.py           tokenizers whose words are those of the captions
    vae.py                 the AutoencoderKL: 64 x 64 pixels <-> (12, 8, 8)
    sdxl.py                the tiny SDXL: a UNet and two CLIP text encoders, pretrained on captions
    vision_pretraining.py  the vision tower of the tiny Qwen2-VL, pretrained to classify attributes
    qwen2_vl.py            the tiny Qwen2-VL, pretrained to describe and to compare images
    classifier.py          a CNN that classifies the attributes of an image
    optimizer.py           the optimizer of every pretraining
    recipe.py              all of these in order, with every size and seed
    examples.py            training examples for the three stages of easyref_core/training and the IP-Adapter
    evaluate.py            accuracy of images generated for held-out groups
    demo_group.py          numbered example groups
    demo_groups.py         the modules with the demo's example groups, by world
    worlds.py              names of the shipped files of both datasets
    clip_text.py, diffusers_folder.py      the text encoders of the demo, from a diffusers folder
    clip.py, baselines.py, benchmark.py    MRBench with baselines trained on the same dataset
    creatures/             a second dataset, with continuous identities, and its models

weights/ is a copy of the output of `make tiny`: base/ (a diffusers SDXL folder), tiny-qwen2-vl/ (config and
tokenizer), tiny_easyref.safetensors (checkpoint of the third stage, with the MLLM) and the classifier.
"""
