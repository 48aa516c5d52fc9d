"""What the three stages take at full size: memory and time, from counted parameters and counted operations.

    python -m easyref_core.training.cost [docs/training_cost.md]

prints the tables, and writes them where a file is given. Nothing is downloaded and no weight is made: the very modules
that are trained run forward and backward on the meta device, in the batch of each stage, and counting.py counts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from ..files.atomic_write import atomic_write_text
from .full_size import (
    EASYREF,
    IMAGE_TOKENS,
    LATENT,
    OTHER_TOKENS,
    Counts,
    context_length,
    counts,
    parameters,
    released_shapes,
)
from .stages import STAGES, Stage, group_of


class Machine(NamedTuple):
    """A GPU. Rates are in operations a second."""

    name: str
    memory: float  # bytes
    bf16: float
    tf32: float
    utilisation: float  # assumed share of the rates that is reached
    reserve: float  # assumed bytes of CUDA context, NCCL buffers, workspaces and fragmentation


A100 = Machine("A100 80GB", memory=80e9, bf16=312e12, tf32=156e12, utilisation=0.4, reserve=4e9)
GPUS = (1, 8, 32)


@dataclass(frozen=True)
class Plan:
    """A stage as its YAML runs it on 32 GPUs; on fewer, more micro-batches are accumulated for the same batch."""

    stage: Stage
    batch: int  # of each GPU
    global_batch: int
    updates: int
    references: int
    zero2: bool  # DeepSpeed ZeRO-2, or every GPU keeps everything


PLANS = (
    Plan(STAGES["alignment"], 8, 256, 300_000, 1, zero2=False),
    Plan(STAGES["single_reference"], 4, 256, 125_000, 1, zero2=True),
    Plan(STAGES["multi_reference"], 1, 128, 50_000, 10, zero2=True),
    Plan(STAGES["multi_reference"], 1, 128, 50_000, 28, zero2=True),
)


@dataclass(frozen=True)
class Estimate:
    """A plan on a number of GPUs."""

    plan: Plan
    gpus: int
    checkpointing: bool
    machine: Machine = A100

    @cached_property
    def trained(self) -> int:
        """Parameters with gradients."""
        shapes = {n: s for n, s in released_shapes().items() if group_of(n) in self.plan.stage.trains}
        return sum(torch.Size(shape).numel() for shape in shapes.values())

    @property
    def frozen_bytes(self) -> int:
        """UNet, text encoders and, in stage 1, the MLLM body in bfloat16; the VAE in float32."""
        parts = parameters()
        body = parts["body"] + parts["vision tower"] if self.plan.stage.body_frozen else 0
        return 2 * (parts["unet"] + parts["text encoders"] + body) + 4 * parts["vae"]

    @property
    def trained_bytes(self) -> float:
        """A bfloat16 copy to compute with, 2 bytes a parameter; float32 weights, gradients and both moments, 16.

        ZeRO-2 spreads the 16 over the GPUs.
        """
        return self.trained * (2 + 16 / (self.gpus if self.plan.zero2 else 1))

    @property
    def counts(self) -> Counts:
        plan = self.plan
        return counts(plan.stage, plan.batch, plan.references, self.checkpointing)

    @property
    def activation_bytes(self) -> int:
        """The VAE is done before the step begins, so the larger of the two counts."""
        return max(self.counts.step.peak, self.counts.vae.peak)

    @property
    def memory(self) -> float:
        """Bytes on each GPU."""
        return self.frozen_bytes + self.trained_bytes + self.activation_bytes + self.machine.reserve

    @property
    def accumulation(self) -> int:
        """Micro-batches of each GPU in an update."""
        return self.plan.global_batch // (self.plan.batch * self.gpus)

    @property
    def seconds(self) -> float:
        """Of one update: the matrix products at the assumed utilisation, nothing else."""
        found = self.counts
        bf16 = (found.step.operations + found.text.operations) / self.machine.bf16
        return self.accumulation * (bf16 + self.vae_share) / self.machine.utilisation

    @property
    def vae_share(self) -> float:
        """Seconds of the VAE in a micro-batch, at the full rate of TF32."""
        return self.counts.vae.operations / self.machine.tf32

    @property
    def days(self) -> float:
        """Of all updates."""
        return self.seconds * self.plan.updates / 86400


def table(header: str, rows: list[tuple[object, ...]]) -> str:
    """A Markdown table; header cells are separated by |."""
    names = header.split("|")
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)


def parameter_table() -> str:
    names = {
        "vision tower": "MLLM: vision tower",
        "body": "MLLM: embedding, 27 layers, norm",
        "last_layer": "last MLLM layer and its norm",
        "reference_tokens": "64 reference tokens",
        "projector": "projector",
        "kv": "K/V adapters, 70 sites",
        "lora": "LoRA of rank 128, 140 attentions",
        "unet": "SDXL's UNet",
        "text encoders": "SDXL's text encoders",
        "vae": "SDXL's VAE",
    }
    trained = {part: "1, 2, 3" for part in ("last_layer", "reference_tokens", "projector", "kv")}
    trained |= {part: "2, 3" for part in ("vision tower", "body", "lora")}
    found = parameters()
    rows = [(names[part], f"{found[part]:,}", trained.get(part, "never")) for part in names]
    return table("part | parameters | trained in stage", rows)


def label(plan: Plan) -> str:
    number = list(STAGES).index(plan.stage.name) + 1
    references = "1 reference" if plan.references == 1 else f"{plan.references} references"
    return f"{number} {plan.stage.name.replace('_', ' ')}, {references}"


def operation_table() -> str:
    """Of one example, in 10^12 operations."""
    rows = []
    for plan in PLANS:
        plain, again = (counts(plan.stage, plan.batch, plan.references, way) for way in (False, True))
        cells = (plain.step, again.step, plain.body, plain.vae, plain.text)
        rows.append((label(plan), *(f"{c.operations / plan.batch / 1e12:.2f}" for c in cells)))
    return table(
        "stage | step | step, checkpointing | of it the MLLM body's forward | VAE | text encoders", rows
    )


def cost_table() -> str:
    rows = []
    for plan in PLANS:
        for gpus in GPUS:
            plain, again = (Estimate(plan, gpus, way) for way in (False, True))
            rows.append(
                (
                    label(plan),
                    gpus,
                    f"{plan.batch} x {plain.accumulation}",
                    _gigabytes(plain.frozen_bytes),
                    _gigabytes(plain.trained_bytes),
                    *(_gigabytes(estimate.activation_bytes) for estimate in (plain, again)),
                    *(_total(estimate) for estimate in (plain, again)),
                    *(f"{estimate.seconds:.1f}" for estimate in (plain, again)),
                    *(_days(estimate) for estimate in (plain, again)),
                )
            )
    return table(
        "stage | GPUs | batch x accumulation | frozen | trained | activations | with checkpointing "
        "| total | with checkpointing | s/update | with checkpointing | days | with checkpointing",
        rows,
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _total(estimate: Estimate) -> str:
    """Bold where it does not fit."""
    text = _gigabytes(estimate.memory)
    return text if estimate.memory <= estimate.machine.memory else f"**{text}**"


def _days(estimate: Estimate) -> str:
    return f"{estimate.days:.0f}" if estimate.days >= 10 else f"{estimate.days:.1f}"


def saving_table() -> str:
    """What cache.py saves of an update's time."""
    rows = []
    for plan in PLANS[:3]:
        estimate = Estimate(plan, 32, checkpointing=not plan.stage.body_frozen)
        found, machine = estimate.counts, estimate.machine
        whole = (found.step.operations + found.text.operations) / machine.bf16 + estimate.vae_share
        body = found.body.operations / machine.bf16 if plan.stage.body_frozen else 0
        context = f"{context_length(plan.references) * EASYREF.hidden_size * 2 / 1e6:.2f} MB"
        rows.append(
            (
                label(plan),
                f"{estimate.vae_share / whole:.1%}",
                f"{2 * 4 * LATENT**2 * 4 / 1e6:.2f} MB",
                f"{body / whole:.1%}" if body else "it is trained",
                context if body else "-",
            )
        )
    return table("stage | latents save | a picture | context states save | a group and text", rows)


def document(machine: Machine = A100) -> str:
    """docs/training_cost.md."""
    return TEXT.format(
        parameters=parameter_table(),
        operations=operation_table(),
        costs=cost_table(),
        savings=saving_table(),
        machine=machine.name,
        bf16=f"{machine.bf16 / 1e12:.0f}",
        tf32=f"{machine.tf32 / 1e12:.0f}",
        utilisation=f"{machine.utilisation:.0%}",
        reserve=f"{machine.reserve / 1e9:.0f}",
        image_tokens=IMAGE_TOKENS,
        other_tokens=OTHER_TOKENS,
        torch=torch.__version__.partition("+")[0],
    )


TEXT = """\
# What training takes at full size

Made by `python -m easyref_core.training.cost docs/training_cost.md` (torch {torch}); nothing here was measured on a
GPU. Parameters, operations and activations are counted on the modules that are trained, run forward and backward on the
meta device; time follows from operations by an assumed utilisation.

## Parameters

{parameters}

## Operations

10^12 additions and multiplications for one example, forward and backward. Weights that are frozen have no gradient of
their own, but the UNet is run through backward in every stage, to reach K and V.

{operations}

## Memory and time

GB (10^9 bytes) on each GPU; what does not fit into {machine} is bold. The batch of an update is the authors' on any number
of GPUs (256, 256 and 128), fewer accumulate more.

{costs}

Assumed:

- {machine}: {bf16} TFLOP/s in bfloat16, {tf32} in TF32 for the float32 VAE, and {utilisation} of either reached. Time is that of
  matrix products, convolutions and attention alone; optimizer, communication and data are taken to hide behind them.
- Activations are the most bytes that live at one time, counted in bfloat16, attention without its matrix. In stage 1,
  under autocast instead of DeepSpeed, the norms work in float32 and take more than is counted.
- Trained weights take 2 bytes for the bfloat16 they are computed in, and 16 for float32 weights, gradients and AdamW's
  moments. Stage 1 keeps all 18 on each GPU; stages 2 and 3 divide the 16 by the GPUs (ZeRO-2).
- {reserve} GB for the CUDA context, NCCL, workspaces and fragmentation are in the total.
- Pictures of 1024 x 1024, square references of {image_tokens} image tokens, {other_tokens} more tokens for template, instruction and
  caption. Groups of 10 references are an assumption (the paper's figure 4 is about there), 28 are the most.
- Updates: 300,000 (the authors' leftover path checkpoint-300000), 125,000 (checkpoint-250000, counted in micro-batches of 2 an
  update), and 50,000 assumed for stage 3, whose number is not published.

## What precomputing saves

With `cache:` set, latents and, in stage 1, context states are computed once and read from then on. Shares of an
update's time (stage 1 without checkpointing, the others with), and what an entry takes on disk:

{savings}

Each costs its full price the first time, so it pays only from the second epoch on, and with native aspect or drawn faces
only as often as the same framing comes round. The VAE's memory peak is saved too.
"""


def main(arguments: list[str] | None = None) -> None:
    """Print the document, and write it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m easyref_core.training.cost", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="where to write it too")
    file = parser.parse_args(arguments).file
    text = document()
    print(text)  # noqa: T201
    if file:
        atomic_write_text(file, text)


if __name__ == "__main__":
    main()
