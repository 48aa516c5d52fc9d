"""What EasyRef does, shown on the tiny model that comes with the pack, without a download.

Writes output/demo.png: groups of references, pictures without EasyRef and with it, painted by workflows/try_it_now.json
in ComfyUI where one is found (devkit/hosts.py), else by the core and diffusers. Prints and writes output/demo.md: how
often what is shared and what the prompt names is right in the pictures of held-out groups, judged by a classifier.
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

if TYPE_CHECKING:
    from easyref_core.mrbench.methods import Method

WEIGHTS = ROOT / "easyref_core" / "tiny" / "weights"
WORKFLOW = ROOT / "workflows" / "try_it_now.json"
SHEET, TABLE = ROOT / "output" / "demo.png", ROOT / "output" / "demo.md"
# Example groups as they come, not chosen: number, references, with an outsider.
SHOWN = ((0, 2, False), (1, 3, False), (2, 4, False), (3, 5, False), (4, 6, False), (5, 6, True))
MOST, PICTURES = 6, 2  # references of a group; pictures of each kind
MEASURED, SEED = 60, 7  # held-out groups, and the seed they are drawn with


class Shown(NamedTuple):
    """One group and what was painted of it."""

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
    from easyref_core.tiny.evaluate import tiny_methods

    hosts, painters = find_hosts(), tiny_methods(WEIGHTS)
    if hosts:
        print(f"demo: workflows/try_it_now.json in ComfyUI {host_version(hosts[0])}", flush=True)
        shown = in_comfyui(hosts[0])
    else:
        print("demo: no ComfyUI found, the core on diffusers", flush=True)
        shown = in_diffusers(painters)
    SHEET.parent.mkdir(exist_ok=True)
    sheet(list(shown)).save(SHEET)
    print(f"demo: wrote {SHEET.relative_to(ROOT)} after {time.monotonic() - start:.0f} s", flush=True)

    TABLE.write_text(table(painters) + "\n", encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
    print(f"demo: wrote {TABLE.relative_to(ROOT)} after {time.monotonic() - start:.0f} s")


# The sheet


def in_comfyui(host: Path) -> Iterator[Shown]:
    """The groups through the shipped workflow, on a server started for it."""
    from devkit.host import graphs
    from devkit.host.server import ComfyServer

    graph = graphs.from_file(WORKFLOW)
    titles = {node["_meta"]["title"]: number for number, node in graph.items()}
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    kinds["EmptyLatentImage"]["batch_size"] = PICTURES
    with ComfyServer(host) as server:
        for number, references, outsider in SHOWN:
            kinds["EasyRefDemo"].update(example=number, references=references, with_outsider=outsider)
            outputs = server.run(graph)["outputs"]
            of = {title: outputs.get(number, {}) for title, number in titles.items()}
            yield Shown(
                *(
                    of[title]["text"][0]
                    for title in ("What the references share", "What the prompt asks for")
                ),
                *(
                    [Image.open(io.BytesIO(png)) for png in server.images({"outputs": {"": of[title]}})]
                    for title in ("References", "Without EasyRef", "With EasyRef")
                ),
            )


def in_diffusers(painters: Mapping[str, Method]) -> Iterator[Shown]:
    """The same groups with easyref_core and diffusers; other noise."""
    from easyref_core.tiny.demo_group import demo_group, in_common
    from easyref_core.tiny.evaluate import Group, paint_groups

    for number, references, outsider in SHOWN:
        plan, drawn = demo_group(number, references, outsider)
        pictures = tuple(Image.fromarray(picture) for picture in drawn)
        group = Group(f"demo-{number}", plan, pictures, pictures[0])
        painted = [
            [paint_groups(painter, [group], seed)[0] for seed in range(PICTURES)]
            for painter in painters.values()
        ]
        yield Shown(in_common(plan), plan.prompt, pictures, *painted)


def sheet(shown: Sequence[Shown]) -> Image.Image:
    """One row a group: references, without, with."""
    rows = {
        f"{number}. The references share: {group.shared}. The prompt: {group.prompt}.": [
            *group.references,
            *[None] * (MOST + 1 - len(group.references)),  # one free place before the painted ones
            *group.without,
            *group.with_easyref,
        ]
        for number, group in enumerate(shown, start=1)
    }
    headings = {0: "references", MOST + 1: "without", MOST + 1 + PICTURES: "with EasyRef"}
    return contact_sheet(rows, cell=112, headings=headings)


# The table


def table(painters: Mapping[str, Method]) -> str:
    """Accuracies over held-out groups, in Markdown."""
    from easyref_core.tiny.classifier import load_classifier
    from easyref_core.tiny.evaluate import accuracy_table, draw
    from easyref_core.tiny.groups import groups_to_judge

    groups = draw(list(groups_to_judge(SEED, MEASURED)), SEED)
    return accuracy_table(painters, groups, load_classifier(), SEED)


if __name__ == "__main__":
    main()
