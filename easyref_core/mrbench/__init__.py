"""MRBench: measures how well images keep what a group of references shares and follow the prompt.

After arXiv 2412.09618, section 4. The flow, in reading order:

    manifest.py       a JSON file with each group's references, prompt, target, category and split
    builder.py        builds one from captioned images (captions.py) or procedural groups; see leaks.py
    training_rows.py  rows to train on, of the held-in topics' images without targets
    generate.py       manifest, config -> <out>/<method>/<group id>/<seed>.png, by the methods in methods/
    record.py         method.json, the provenance of those images; latency.py measures their seconds
    training_seeds.py entries <method>@<seed> of a method that was trained several times
    score.py          those images     -> pictures.csv (rows.py), summary.csv (summary.py), excluded.csv
    group_scores.py   images of some groups -> their rows, with
    extractors.py     images, prompts  -> features
    metrics.py        features         -> CLIP-I, CLIP-T, DINO-I; bootstrap intervals, win rates
    report.py         those CSVs       -> report.md and plots (plots.py), with paper_numbers.py

    images.py         image files, and exclusions of broken ones
    checks.py         validation of JSON and YAML objects
    processes.py      the processes of `accelerate launch`

Generating and scoring share only the layout of the image folder. __main__.py is the command line.
"""
