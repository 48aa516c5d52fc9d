"""MRBench: how well pictures keep what a group of references shares, and follow the prompt (arXiv 2412.09618, section 4).

The flow, in reading order:

    manifest.py       one JSON file: each group's references, prompt, target, category and split
    builder.py        makes one from captioned images (captions.py) or from made groups; refuses repeats, leaks.py
    generate.py       manifest, config    -> <out>/<method>/<group id>/<seed>.png, by the methods in methods/
    score.py          those pictures      -> pictures.csv (a row each, rows.py), summary.csv (summary.py), excluded.csv
    group_scores.py   some groups' pictures -> their rows, by way of
    extractors.py     pictures, prompts   -> features, by models named exactly
    metrics.py        features            -> CLIP-I, CLIP-T, DINO-I; bootstrap intervals, win rates
    report.py         those CSVs          -> report.md and plots (plots.py), beside the paper's numbers (paper_numbers.py)

    pictures.py       picture files, and naming the broken ones
    processes.py      this process among those `accelerate launch` started

Generating and scoring know of each other only the layout of the pictures' folder. __main__.py is the command line.
"""
