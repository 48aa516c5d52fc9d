"""Demo of EasyRef with the tiny models that ship with the pack; it downloads nothing.

Writes output/demo.png: groups of creatures, and images generated without and with EasyRef, by
workflows/try_it_now.json in ComfyUI if there is one (devkit/hosts.py), else by the core and diffusers. Prints
and writes output/demo.md: for new groups of creatures, how similar the generated creature is to the shared
one, and for held-out groups of shapes, the accuracy of shared and named attributes.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from devkit.cpu_torch import complete_cpu_torch
from devkit.hosts import ROOT, find_hosts, host_version
from easyref_core.inspect.drawing import contact_sheet
from easyref_core.tiny.creatures.demo_group import demo_group

if TYPE_CHECKING:
    from easyref_core.mrbench.methods import Method

WORKFLOW = ROOT / "workflows" / "try_it_now.json"
SHEET, TABLE = ROOT / "output" / "demo.png", ROOT / "output" / "demo.md"
# The first example groups, not selected: number, references, with an outsider.
EXAMPLES = ((0, 2, False), (1, 3, False), (2, 4, False), (3, 5, False), (4, 6, False), (5, 5, True))
MAX_REFERENCES, IMAGES = 6, 2  # references of a group; images of each method
GROUPS, SEED = 60, 7  # groups of each table, and the seed they are drawn with


class Example(NamedTuple):
    """One group and its generated images."""

    shared: str
    prompt: str
    references: Sequence[Image.Image]
    without: Sequence[Image.Image]
    with_easyref: Sequence[Image.Image]


def main() -> None:
    start = time.monotonic()
    complete_cpu_torch()
    from transformers.utils import logging

    logging.disable_progress_bar()
    from easyref_core.tiny.creatures.evaluate import creature_methods
    from easyref_core.tiny.worlds import CREATURES

    hosts, methods = find_hosts(), creature_methods(CREATURES.weights)
    if hosts:
        print(f"demo: workflows/try_it_now.json in ComfyUI {host_version(hosts[0])}", flush=True)
        examples = in_comfyui(hosts[0])
    else:
        print("demo: no ComfyUI found, the core on diffusers", flush=True)
        examples = in_diffusers(methods)
    SHEET.parent.mkdir(exist_ok=True)
    sheet(list(examples)).save(SHEET)
    print(f"demo: wrote {SHEET.relative_to(ROOT)} after {time.monotonic() - start:.0f} s", flush=True)

    TABLE.write_text(f"{creatures_table(methods)}\n\n{shapes_table()}\n", encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
    print(f"demo: wrote {TABLE.relative_to(ROOT)} after {time.monotonic() - start:.0f} s")


# The sheet


def in_comfyui(host: Path) -> Iterator[Example]:
    """Generate the images of the examples with the shipped workflow, on a server started for it."""
    from devkit.host import graphs
    from devkit.host.server import ComfyServer

    graph = graphs.from_file(WORKFLOW)
    titles = {node["_meta"]["title"]: number for number, node in graph.items()}
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    kinds["EmptyLatentImage"]["batch_size"] = IMAGES
    with ComfyServer(host) as server:
        for number, references, outsider in EXAMPLES:
            kinds["EasyRefDemo"].update(example=number, references=references, with_outsider=outsider)
            outputs = server.run(graph)["outputs"]
            by_title = {title: outputs.get(number, {}) for title, number in titles.items()}
            group = demo_group(number, references, outsider)
            images = [
                [Image.open(io.BytesIO(png)) for png in server.images({"outputs": {"": by_title[title]}})]
                for title in ("References", "Without EasyRef", "With EasyRef")
            ]
            yield Example(group.shared, group.prompt, *images)


def in_diffusers(methods: Mapping[str, Method]) -> Iterator[Example]:
    """Generate the images of the same examples with the core and diffusers, from other noise."""
    from easyref_core.mrbench.methods import Task
    from easyref_core.tiny.creatures.evaluate import SAMPLING
    from easyref_core.tiny.evaluate import generate_images

    for number, references, outsider in EXAMPLES:
        group = demo_group(number, references, outsider)
        images = tuple(map(Image.fromarray, group.references))
        task = Task(f"demo-{number}", group.prompt, images)
        generated = [
            [generate_images(method, [task], seed, SAMPLING)[0] for seed in range(IMAGES)]
            for method in methods.values()
        ]
        yield Example(group.shared, group.prompt, images, *generated)


def sheet(examples: Sequence[Example]) -> Image.Image:
    """One row per group: references, without, with."""
    rows = {
        f"{number}. The references share: {group.shared}. The prompt: {group.prompt}.": [
            *group.references,
            *[None]
            * (MAX_REFERENCES + 1 - len(group.references)),  # one empty column before the generated images
            *group.without,
            *group.with_easyref,
        ]
        for number, group in enumerate(examples, start=1)
    }
    headings = {0: "references", MAX_REFERENCES + 1: "without", MAX_REFERENCES + 1 + IMAGES: "with EasyRef"}
    return contact_sheet(rows, cell=112, headings=headings)


# The tables


def creatures_table(methods: Mapping[str, Method]) -> str:
    """Measures over groups of new creatures, in Markdown."""
    import numpy as np

    from easyref_core.tiny.creatures.evaluate import identity_table
    from easyref_core.tiny.creatures.groups import render_groups
    from easyref_core.tiny.creatures.identities import draw_identities
    from easyref_core.tiny.creatures.judge import load_judge

    groups = render_groups(draw_identities(np.random.default_rng(SEED), GROUPS), SEED)
    return identity_table(methods, groups, load_judge(), SEED)


def shapes_table() -> str:
    """Accuracies over held-out groups of shapes, in Markdown."""
    from easyref_core.tiny.classifier import load_classifier
    from easyref_core.tiny.evaluate import accuracy_table, render_groups, tiny_methods
    from easyref_core.tiny.groups import evaluation_groups
    from easyref_core.tiny.worlds import SHAPES

    groups = render_groups(list(evaluation_groups(SEED, GROUPS)), SEED)
    return accuracy_table(tiny_methods(SHAPES.weights), groups, load_classifier(), SEED)


if __name__ == "__main__":
    main()
