"""Cost model of the three stages at full size; it generates docs/training_cost.md.

    python -m easyref_core.training.cost [docs/training_cost.md]

prints the tables, and writes them to the file if one is given. Nothing is downloaded and no weight is
allocated: the trained modules run forward and backward on the meta device with the batch of each stage, and
counting.py counts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from ..files.atomic_write import atomic_write_text
from .config import load
from .full_size import (
    EASYREF,
    IMAGE_SIDE,
    IMAGE_TOKENS,
    LATENT_SIDE,
    OTHER_TOKENS,
    MicroBatchCost,
    Workload,
    context_length,
    micro_batch_cost,
    parameters,
    weights,
)
from .optimizers import copy_bytes, state_bytes
from .stages import STAGES, Stage


class Machine(NamedTuple):
    """A GPU."""

    name: str
    memory_bytes: float
    bf16_flops: float  # per second
    tf32_flops: float  # per second
    utilisation: float  # assumption: fraction of the peak rates that is reached
    reserve_bytes: float  # assumption: CUDA context, NCCL buffers, workspaces and fragmentation


A100 = Machine("A100 80GB", 80e9, bf16_flops=312e12, tf32_flops=156e12, utilisation=0.4, reserve_bytes=4e9)
# Dense rates of the makers' data sheets, accumulated in float32; a single GPU needs no NCCL buffers.
MACHINES = (
    Machine("RTX 4090", 24e9, bf16_flops=165e12, tf32_flops=82.6e12, utilisation=0.4, reserve_bytes=1.5e9),
    Machine("L40S", 48e9, bf16_flops=362e12, tf32_flops=183e12, utilisation=0.4, reserve_bytes=1.5e9),
    A100._replace(reserve_bytes=1.5e9),
    Machine("H100 SXM", 80e9, bf16_flops=989e12, tf32_flops=494e12, utilisation=0.4, reserve_bytes=1.5e9),
)
GPUS = (1, 8, 32)
TEMPLATE = Path(__file__).with_name("cost_template.md")


@dataclass(frozen=True)
class Plan:
    """A stage as in its YAML for 32 GPUs; fewer GPUs accumulate more for the same global batch."""

    stage: Stage
    batch: int  # per GPU
    global_batch: int
    updates: int
    references: int
    zero2: bool  # DeepSpeed ZeRO-2 instead of replicas
    side: int = IMAGE_SIDE  # pixels of a target


def _plan(file: str, references: int, zero2: bool) -> Plan:
    """Plan of a YAML, whose accumulation is for 32 GPUs."""
    [settings] = load(Path(__file__).parent / "configs" / file)
    sizes = {"global_batch": 32 * settings.accumulation * settings.batch_size, "updates": settings.updates}
    return Plan(settings.stage_spec, settings.batch_size, **sizes, references=references, zero2=zero2)


def _small_plan(stage: Stage, references: int) -> Plan:
    """Plan of finetune_small.yaml on one GPU."""
    [settings] = load(Path(__file__).parent / "configs" / "finetune_small.yaml")
    sizes = {"global_batch": settings.accumulation * settings.batch_size, "updates": settings.updates}
    sizes |= {"side": settings.data.augmentation.resolution}
    return Plan(stage, settings.batch_size, **sizes, references=references, zero2=False)


PLANS = (
    _plan("1_alignment.yaml", references=1, zero2=False),
    _plan("2_single_reference.yaml", references=1, zero2=True),
    _plan("3_multi_reference.yaml", references=10, zero2=True),
    _plan("3_multi_reference.yaml", references=28, zero2=True),
)


@dataclass(frozen=True)
class Levers:
    """Settings that lower the memory of a run, as in config.Settings."""

    optimizer: str = "adamw"
    weight_dtype: str = "float32"
    mllm_lora_rank: int = 0
    precomputed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a plan on a number of GPUs."""

    plan: Plan
    gpus: int
    checkpointing: bool
    machine: Machine = A100
    levers: Levers = Levers()

    @cached_property
    def num_trained(self) -> int:
        """Number of parameters with gradients."""
        stage = self.plan.stage
        trained = weights(stage, mllm_lora_rank=self.levers.mllm_lora_rank).trained(stage)
        return sum(tensor.numel() for tensor in trained.values())

    @property
    def frozen_bytes(self) -> int:
        """UNet, text encoders and a frozen MLLM body in bfloat16, the VAE in float32; what is not parked."""
        numbers, precomputed = parameters(), self.levers.precomputed
        size = 2 * numbers["unet"]
        if "texts" not in precomputed:
            size += 2 * numbers["text encoders"]
        if "latents" not in precomputed:
            size += 4 * numbers["vae"]
        frozen = self.plan.stage.body_frozen or self.levers.mllm_lora_rank
        if frozen and "contexts" not in precomputed:
            size += 2 * (numbers["body"] + numbers["vision tower"])
        return size

    @property
    def trained_bytes(self) -> float:
        """The bfloat16 copy of the weights, and weights, gradients and moments, which ZeRO-2 shards."""
        levers = self.levers
        states = state_bytes(levers.optimizer, levers.weight_dtype)
        return self.num_trained * (
            copy_bytes(levers.weight_dtype) + states / (self.gpus if self.plan.zero2 else 1)
        )

    @property
    def cost(self) -> MicroBatchCost:
        plan = self.plan
        contexts = self.levers.precomputed & {"contexts"}
        workload = Workload(
            stage=plan.stage,
            batch=plan.batch,
            references=plan.references,
            checkpointing=self.checkpointing,
            mllm_lora_rank=self.levers.mllm_lora_rank,
            precomputed=contexts,
            side=plan.side,
        )
        return micro_batch_cost(workload)

    @property
    def activation_bytes(self) -> int:
        """The larger of two peaks, because the VAE finishes before the step begins."""
        vae = 0 if "latents" in self.levers.precomputed else self.cost.vae.peak_bytes
        return max(self.cost.step.peak_bytes, vae)

    @property
    def total_bytes(self) -> float:
        """Memory per GPU."""
        return self.frozen_bytes + self.trained_bytes + self.activation_bytes + self.machine.reserve_bytes

    @property
    def accumulation(self) -> int:
        """Micro-batches per GPU and update."""
        return self.plan.global_batch // (self.plan.batch * self.gpus)

    @property
    def seconds(self) -> float:
        """Time of one update: the counted FLOPs at the assumed utilisation."""
        return self.accumulation * self.peak_seconds / self.machine.utilisation

    @property
    def peak_seconds(self) -> float:
        """Time of a micro-batch at the peak rates."""
        text = 0 if "texts" in self.levers.precomputed else self.cost.text.flops
        vae = 0 if "latents" in self.levers.precomputed else self.vae_seconds
        return (self.cost.step.flops + text) / self.machine.bf16_flops + vae

    @property
    def vae_seconds(self) -> float:
        """Time of the VAE in a micro-batch at the peak rate."""
        return self.cost.vae.flops / self.machine.tf32_flops

    @property
    def days(self) -> float:
        """Time of all updates."""
        return self.seconds * self.plan.updates / 86400


GROUPS = _small_plan(STAGES["multi_reference"], references=8)
SINGLES = _small_plan(STAGES["alignment"], references=1)
STORED = frozenset({"latents", "texts"})
RANK = 64
# Name, plan, gradient checkpointing and levers of the rows of `lever_table`.
LEVERS = (
    ("stage 3, AdamW", GROUPS, False, Levers()),
    ("with gradient checkpointing", GROUPS, True, Levers()),
    ("and latents and texts precomputed", GROUPS, True, Levers(precomputed=STORED)),
    ("and 8-bit AdamW", GROUPS, True, Levers("adamw_8bit", precomputed=STORED)),
    ("or Adafactor", GROUPS, True, Levers("adafactor", precomputed=STORED)),
    ("AdamW, bfloat16 weights", GROUPS, True, Levers("adamw", "bfloat16", precomputed=STORED)),
    ("8-bit AdamW, bfloat16 weights", GROUPS, True, Levers("adamw_8bit", "bfloat16", precomputed=STORED)),
    ("Adafactor, bfloat16 weights", GROUPS, True, Levers("adafactor", "bfloat16", precomputed=STORED)),
    ("stage 3 with a LoRA of the MLLM, AdamW", GROUPS, True, Levers("adamw", "float32", RANK)),
    ("and latents and texts precomputed", GROUPS, True, Levers("adamw", "float32", RANK, STORED)),
    ("and 8-bit AdamW", GROUPS, True, Levers("adamw_8bit", "float32", RANK, STORED)),
    ("or Adafactor", GROUPS, True, Levers("adafactor", "float32", RANK, STORED)),
    ("8-bit AdamW, bfloat16 weights", GROUPS, True, Levers("adamw_8bit", "bfloat16", RANK, STORED)),
    ("stage 1, AdamW", SINGLES, True, Levers()),
    ("and latents and texts precomputed", SINGLES, True, Levers(precomputed=STORED)),
    ("and contexts precomputed", SINGLES, True, Levers(precomputed=STORED | {"contexts"})),
    ("and 8-bit AdamW", SINGLES, True, Levers("adamw_8bit", precomputed=STORED | {"contexts"})),
)


def table(header: str, rows: list[tuple[object, ...]]) -> str:
    """Format a Markdown table; header cells are separated by |."""
    names = header.split("|")
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)


PARTS = {  # name in `parameters`: title, stages that train it
    "vision tower": ("MLLM: vision tower", "2, 3"),
    "body": ("MLLM: embedding, 27 layers, norm", "2, 3"),
    "last_layer": ("last MLLM layer and its norm", "1, 2, 3"),
    "reference_tokens": ("64 reference tokens", "1, 2, 3"),
    "projector": ("projector", "1, 2, 3"),
    "kv": ("K/V adapters, 70 sites", "1, 2, 3"),
    "lora": ("LoRA of rank 128, 140 attentions", "2, 3"),
    "unet": ("SDXL's UNet", "never"),
    "text encoders": ("SDXL's text encoders", "never"),
    "vae": ("SDXL's VAE", "never"),
}


def parameter_table() -> str:
    numbers = parameters()
    rows = [(title, f"{numbers[name]:,}", stages) for name, (title, stages) in PARTS.items()]
    return table("part | parameters | trained in stage", rows)


def label(plan: Plan) -> str:
    number = list(STAGES).index(plan.stage.name) + 1
    references = "1 reference" if plan.references == 1 else f"{plan.references} references"
    return f"{number} {plan.stage.name.replace('_', ' ')}, {references}"


def flops_table() -> str:
    """TFLOP of one example."""
    rows = []
    for plan in PLANS:
        plain, recomputing = (Estimate(plan, 1, checkpointing).cost for checkpointing in (False, True))
        cells = (plain.step, recomputing.step, plain.body, plain.vae, plain.text)
        rows.append((label(plan), *(f"{cell.flops / plan.batch / 1e12:.2f}" for cell in cells)))
    return table(
        "stage | step | step, checkpointing | thereof: MLLM body forward | VAE | text encoders", rows
    )


def cost_table() -> str:
    rows = []
    for plan, gpus in ((plan, gpus) for plan in PLANS for gpus in GPUS):
        plain, _ = both = [Estimate(plan, gpus, checkpointing) for checkpointing in (False, True)]
        rows.append(
            (
                label(plan),
                gpus,
                f"{plan.batch} x {plain.accumulation}",
                _gigabytes(plain.frozen_bytes),
                _gigabytes(plain.trained_bytes),
                *(_gigabytes(e.activation_bytes) for e in both),
                *(_total(e) for e in both),
                *(f"{e.seconds:.1f}" for e in both),
                *(f"{e.days:.{0 if e.days >= 10 else 1}f}" for e in both),
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
    """Total memory, bold if it exceeds the GPU's."""
    bold = "**" if estimate.total_bytes > estimate.machine.memory_bytes else ""
    return f"{bold}{_gigabytes(estimate.total_bytes)}{bold}"


def lever_table() -> str:
    """Memory of the plans of a single GPU under each lever, and seconds per update where it fits."""
    rows = []
    for name, plan, checkpointing, levers in LEVERS:
        estimates = [Estimate(plan, 1, checkpointing, machine, levers) for machine in MACHINES]
        first = estimates[0]
        parts = (first.frozen_bytes, first.trained_bytes, first.activation_bytes, first.total_bytes)
        fits = [f"{e.seconds:.0f} s" if e.total_bytes <= e.machine.memory_bytes else "no" for e in estimates]
        rows.append((name, f"{first.num_trained / 1e6:.0f} M", *map(_gigabytes, parts), *fits))
    names = " | ".join(machine.name for machine in MACHINES)
    return table(f"levers | trained | frozen | trained | activations | total | {names}", rows)


def saving_table() -> str:
    """Time that cache.py saves per update."""
    rows = []
    for plan in PLANS[:3]:
        estimate = Estimate(plan, 32, checkpointing=not plan.stage.body_frozen)
        body = estimate.cost.body.flops / estimate.machine.bf16_flops / estimate.peak_seconds
        context = f"{context_length(plan.references) * EASYREF.hidden_size * 2 / 1e6:.2f} MB"
        rows.append(
            (
                label(plan),
                f"{estimate.vae_seconds / estimate.peak_seconds:.1%}",
                f"{2 * 4 * LATENT_SIDE**2 * 4 / 1e6:.2f} MB",
                *((f"{body:.1%}", context) if plan.stage.body_frozen else ("body is trained", "-")),
            )
        )
    return table("stage | latents save | per image | context states save | per group and text", rows)


def document(machine: Machine = A100) -> str:
    """Text of docs/training_cost.md."""
    return TEMPLATE.read_text(encoding="utf-8").format(
        parameters=parameter_table(),
        flops=flops_table(),
        costs=cost_table(),
        savings=saving_table(),
        levers=lever_table(),
        lora_rank=RANK,
        group=GROUPS.references,
        small_side=GROUPS.side,
        small_batch=GROUPS.global_batch,
        machines="; ".join(
            f"{m.name} {m.memory_bytes / 1e9:.0f}, {m.bf16_flops / 1e12:.0f} and {m.tf32_flops / 1e12:.0f}"
            for m in MACHINES
        ),
        small_reserve=f"{MACHINES[0].reserve_bytes / 1e9:.1f}",
        machine=machine.name,
        bf16=f"{machine.bf16_flops / 1e12:.0f}",
        tf32=f"{machine.tf32_flops / 1e12:.0f}",
        utilisation=f"{machine.utilisation:.0%}",
        reserve=f"{machine.reserve_bytes / 1e9:.0f}",
        image_tokens=IMAGE_TOKENS,
        other_tokens=OTHER_TOKENS,
        torch=torch.__version__.partition("+")[0],
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the document, and write it to a file if one is given."""
    parser = argparse.ArgumentParser(prog="python -m easyref_core.training.cost", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="file to write the tables to")
    file = parser.parse_args(arguments).file
    text = document()
    print(text)  # noqa: T201
    if file:
        atomic_write_text(file, text)


if __name__ == "__main__":
    main()
