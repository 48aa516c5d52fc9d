"""A second procedural dataset: creatures whose identities are real numbers that no prompt names.

In reading order:

    identities.py          13 numbers in -1..1: outline, two colours, stripes
    images.py              creatures on grounds, alone or among others -> images of 64 pixels
    captions.py            captions: ground, place and number of creatures
    descriptions.py        words for identities, which the base knows
    dataset.py             training images, rendered once
    groups.py              groups with one creature in common, and their targets
    examples.py            training examples for the three stages and the IP-Adapter
    vision_pretraining.py  the vision tower, pretrained to measure identities
    qwen2_vl.py            the Qwen2-VL, pretrained to describe and to compare
    judge.py               a CNN that measures the creature of an image
    recipe.py              all of these in order, with every size and seed
    evaluate.py            similarity of generated creatures to those of their groups
    demo_group.py          numbered example groups
    image_encoder.py, baselines.py, benchmark.py      MRBench, with baselines trained on the same images
"""
