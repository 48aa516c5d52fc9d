"""The loop: an update is what it should be, loss falls, stages chain, and what they leave loads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from PIL import Image
from safetensors.torch import load_file

import easyref_core as er
import easyref_core.training
from easyref_core.mllm.preprocess import preprocess
from easyref_core.training.base_model import BaseModel
from easyref_core.training.batches import loader
from easyref_core.training.config import Samples, Settings, load
from easyref_core.training.initial import from_checkpoint
from easyref_core.training.loop import train
from easyref_core.training.run import Run, learning_rate, randomness
from easyref_core.training.run_log import read_metrics
from easyref_core.training.sampling import generate_images, references_of
from easyref_core.training.stages import STAGES

from . import tiny

CONFIGS = Path(easyref_core.training.__file__).parent / "configs"


@pytest.fixture(scope="module")
def examples() -> tiny.TinyExamples:
    return tiny.TinyExamples(tiny.config())


def run_of(settings: Settings, examples: tiny.TinyExamples) -> Run:
    plugin = GradientAccumulationPlugin(num_steps=settings.accumulation, sync_with_dataloader=False)
    return Run(settings, Accelerator(gradient_accumulation_plugin=plugin), examples)


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


class TestUpdate:
    def test_it_is_adamw_by_hand(
        self, base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples
    ) -> None:
        """m and v of the first step are the gradient and its square, so the step is rate * g / (|g| + eps)."""
        run = run_of(tiny.settings(base_folder, tmp_path, learning_rate=1e-3), examples)
        batch = examples.batch(range(2))
        before = trained(run)
        timesteps, noise, draw = randomness(batch, run.base)
        latents = run.base.encode_pictures(batch.pixels, draw)
        signal = run.base.schedule.alphas_cumprod[timesteps][:, None, None, None]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        predicted = run.model(noisy, timesteps, run.base.encode_text(batch.prompts), batch)
        loss = ((predicted - noise) ** 2).mean()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.requires_grad}
        run.model.zero_grad()
        found, norm = run.update(iter([batch]), 0, measure=True)
        assert math.isclose(found.item(), loss.item(), rel_tol=1e-6)
        squares = sum(gradient.square().sum() for gradient in gradients.values())
        assert math.isclose(float(norm), float(squares.sqrt()), rel_tol=1e-5)
        for name, after in trained(run).items():
            wanted = before[name] - 1e-3 * gradients[name] / (gradients[name].abs() + 1e-8)
            assert torch.allclose(after, wanted, atol=1e-7, rtol=1e-5), name

    def test_accumulated_micro_batches_are_one_batch(
        self, base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples
    ) -> None:
        gradients = []
        for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
            settings = tiny.settings(base_folder, tmp_path, batch_size=batch, accumulation=accumulation)
            run = run_of(settings, examples)
            batches = loader(examples, 0, 1, batch, accumulation)
            for _ in range(accumulation):
                with run.accelerator.accumulate(run.prepared):
                    run.accelerator.backward(run.loss(next(batches)))
            gradients.append({n: p.grad for n, p in run.model.named_parameters() if p.requires_grad})
        for name, wanted in gradients[0].items():
            assert all((g[name] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-9 for g in gradients), name

    def test_noise_and_timestep_come_from_the_sample_s_seed(
        self, base: BaseModel, examples: tiny.TinyExamples
    ) -> None:
        together = randomness(examples.batch(range(4)), base)
        alone = [randomness(examples.batch(range(i, i + 1)), base) for i in range(4)]
        for part, parts in zip(together, zip(*alone, strict=True), strict=True):
            assert torch.equal(part, torch.cat(parts))
        assert len(set(together[0].tolist())) > 1


def test_loss_falls_on_a_fixed_set(base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples) -> None:
    settings = tiny.settings(base_folder, tmp_path, **tiny.GOLDEN_START, learning_rate=1e-2, batch_size=4)
    run = run_of(settings, examples)
    batch = examples.batch(range(4))
    losses = [run.update(iter([batch]), number, measure=False)[0].item() for number in range(30)]
    assert losses[-1] < 0.85 * losses[0]


@pytest.fixture(scope="module")
def chain(
    base_folder: Path, tmp_path_factory: pytest.TempPathFactory, examples: tiny.TinyExamples
) -> dict[str, Path]:
    """One update of each stage, each started from the one before."""
    folder, results = tmp_path_factory.mktemp("chain"), {}
    for name, stage in STAGES.items():
        settings = tiny.settings(
            base_folder, folder / name, stage=name, start=results.get(stage.starts_from), learning_rate=1e-2
        )
        results[name] = train(settings, examples)
    return results


class TestStages:
    @pytest.mark.parametrize("name", STAGES)
    def test_what_it_leaves_loads(self, chain: dict[str, Path], name: str) -> None:
        model = er.load(chain[name], tiny.MLLM)
        assert model.config.num_tokens == tiny.TOKENS
        assert model.config.lora_rank == (4 if "lora" in STAGES[name].trains else 0)
        tokens = model.aggregate(model.encode([tiny.picture(0)], "a", size=tiny.REFERENCE))
        assert tokens.shape == (1, tiny.TOKENS, 32)

    def test_the_first_leaves_the_mllm_s_body_out(self, chain: dict[str, Path]) -> None:
        parts = {name: {key.split(".")[0] for key in load_file(path)} for name, path in chain.items()}
        assert parts["alignment"] == {"mllm_final_layer", "image_proj_model", "unet"}
        assert parts["multi_reference"] == parts["alignment"] | {"multimodal_llm"}

    def test_each_continues_the_one_before(self, base: BaseModel, chain: dict[str, Path]) -> None:
        """The next stage starts where the last ended: a step of AdamW moves a weight by no more than its rate."""
        made = [from_checkpoint(path, tiny.MLLM, base.unet).tensors for path in chain.values()]
        for earlier, later in zip(made, made[1:], strict=False):
            steps = {name: (later[name] - tensor).abs().max().item() for name, tensor in earlier.items()}
            assert 0.5e-2 < max(steps.values()) <= 1.001e-2

    def test_the_first_moves_nothing_of_the_body(self, base: BaseModel, chain: dict[str, Path]) -> None:
        weights = from_checkpoint(chain["alignment"], tiny.MLLM, base.unet)
        assert weights.body_is_base
        assert not from_checkpoint(chain["multi_reference"], tiny.MLLM, base.unet).body_is_base

    def test_the_first_after_others_keeps_their_body_and_lora(
        self, base_folder: Path, tmp_path: Path, chain: dict[str, Path], examples: tiny.TinyExamples
    ) -> None:
        result = train(tiny.settings(base_folder, tmp_path, start=chain["multi_reference"]), examples)
        before, after = load_file(chain["multi_reference"]), load_file(result)
        assert before.keys() == after.keys()
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {name for name in before if name.startswith("multimodal_llm.") or "_lora." in name}

    def test_sizes_that_are_not_the_checkpoint_s_are_refused(
        self, base_folder: Path, tmp_path: Path, chain: dict[str, Path], examples: tiny.TinyExamples
    ) -> None:
        common = {"stage": "multi_reference", "start": chain["single_reference"]}
        with pytest.raises(ValueError, match=r"has num_tokens 6, the run asks for 7. Set num_tokens: 6"):
            train(tiny.settings(base_folder, tmp_path / "a", **common, num_tokens=7), examples)
        with pytest.raises(ValueError, match=r"LoRA of rank 4, the run asks for lora_rank 8"):
            train(tiny.settings(base_folder, tmp_path / "b", **common, lora_rank=8), examples)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision(
        self, base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples, dtype: str
    ) -> None:
        result = train(tiny.settings(base_folder, tmp_path, save_dtype=dtype), examples)
        assert {tensor.dtype for tensor in load_file(result).values()} == {getattr(torch, dtype)}
        er.load(result, tiny.MLLM)


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.name)
def test_every_yaml_takes_a_tiny_step(
    base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples, file: Path
) -> None:
    for settings in load(file):
        tiny_one = {"base": base_folder, "mllm": tiny.MLLM, "output": tmp_path / settings.stage, "updates": 1}
        sizes = {"num_tokens": 8, "lora_rank": 8, "batch_size": 1, "workers": 0}
        data = dataclasses.replace(
            settings.data, augmentation=dataclasses.replace(settings.data.augmentation, size=tiny.REFERENCE)
        )
        start = settings.start and tiny.GOLDEN_START["start"]
        samples = dataclasses.replace(settings.samples, steps=1, count=1)
        settings = dataclasses.replace(settings, **tiny_one, **sizes, data=data, start=start, samples=samples)
        er.load(train(settings, examples), tiny.MLLM)
        assert len(list((settings.output / "samples").iterdir())) == 1


@pytest.fixture(scope="module")
def output(base_folder: Path, tmp_path_factory: pytest.TempPathFactory, examples: tiny.TinyExamples) -> Path:
    """The output folder of a run of 3 updates."""
    folder = tmp_path_factory.mktemp("records")
    samples = Samples(every=2, count=2, steps=2)
    train(tiny.settings(base_folder, folder, updates=3, samples=samples), examples)
    return folder


class TestRecords:
    def test_every_logged_update_has_its_numbers(self, output: Path) -> None:
        rows = read_metrics(output / "metrics.csv")
        assert [row["update"] for row in rows] == [1, 2, 3]
        for row in rows:
            assert all(math.isfinite(value) and value > 0 for value in row.values())

    def test_tensorboard_has_the_same(self, output: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(output / "tensorboard"))
        board.Reload()
        losses = [(event.step, round(event.value, 4)) for event in board.Scalars("loss")]
        assert losses == [(r["update"], round(r["loss"], 4)) for r in read_metrics(output / "metrics.csv")]
        assert set(board.Tags()["scalars"]) == {
            "loss",
            "learning_rate",
            "gradient_norm",
            "samples_per_second",
        }
        assert [event.step for event in board.Images("samples")] == [2, 3]

    def test_sheets_of_samples_are_there(self, output: Path) -> None:
        sheets = sorted((output / "samples").iterdir())
        assert [sheet.name for sheet in sheets] == ["0000002.png", "0000003.png"]
        assert Image.open(sheets[0]).size > (300, 200)


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As under accelerate launch --mixed_precision bf16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16(base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples, stage: str) -> None:
    """What is frozen is held in bfloat16, what is trained stays float32."""
    start = {} if stage == "alignment" else {**tiny.GOLDEN_START, "stage": stage}
    samples = Samples(every=1, count=1, steps=1)
    settings = tiny.settings(base_folder, tmp_path, **start, samples=samples, gradient_checkpointing=True)
    run = run_of(settings, examples)
    assert run.base.unet.dtype == torch.bfloat16
    assert run.model.encoder.norm.weight.dtype == (
        torch.bfloat16 if STAGES[stage].body_frozen else torch.float32
    )
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    train(settings, examples)
    [row] = read_metrics(tmp_path / "metrics.csv")
    assert math.isfinite(row["loss"])


@pytest.mark.parametrize("aggregation", ["average", "concatenation"])
def test_the_other_aggregations_train_and_paint(
    base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples, aggregation: str
) -> None:
    samples = Samples(every=1, count=2, steps=2)
    train(tiny.settings(base_folder, tmp_path, aggregation=aggregation, samples=samples), examples)
    assert (tmp_path / "samples" / "0000001.png").is_file()


def test_the_cache_changes_nothing(base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples) -> None:
    """Twice through the same examples: the second time, latents and context states come from the folder."""
    common = {"updates": 8, "learning_rate": 1e-3}
    plain = train(tiny.settings(base_folder, tmp_path / "plain", **common), examples)
    kept = train(tiny.settings(base_folder, tmp_path / "kept", cache=tmp_path / "cache", **common), examples)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 * len(examples)
    wanted, found = load_file(plain), load_file(kept)
    # By norm: Adam makes a whole step of a gradient that is nothing but rounding, so that on some processors a
    # few weights of many differ by half a step.
    assert all((wanted[name] - found[name]).norm() <= 1e-3 * wanted[name].norm() for name in wanted)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate(base_folder: Path, tmp_path: Path, schedule: str, wanted: list[float]) -> None:
    settings = tiny.settings(base_folder, tmp_path, schedule=schedule, updates=6, warmup=2, learning_rate=2.0)
    rates = [learning_rate(settings, 2 + number) / 2 for number in range(len(wanted))]
    assert rates == pytest.approx(wanted, abs=1e-6)
    assert [learning_rate(settings, number) for number in (0, 1)] == [1.0, 2.0]


class TestPainting:
    def test_guidance_1_is_the_conditional_half_alone(self, base: BaseModel) -> None:
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        first = generate_images(base, noise, ["abc", "de"], negative="x", guidance=1.0, steps=3)
        other = generate_images(base, noise, ["abc", "de"], negative="fgh", guidance=1.0, steps=3)
        assert [image.size for image in first] == [(64, 64)] * 2
        assert [image.tobytes() for image in first] == [image.tobytes() for image in other]

    def test_a_picture_depends_on_nothing_else_in_its_batch(self, base: BaseModel) -> None:
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        together = generate_images(base, noise, ["abc", "de"], steps=3)
        alone = generate_images(base, noise[1:], ["de"], steps=3)
        differ = (
            torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).int() for i in (together[1], *alone)
        )
        first, second = differ
        assert (first - second).abs().max() <= 1

    def test_references_are_shown_as_the_mllm_sees_them(self, examples: tiny.TinyExamples) -> None:
        size = 84
        images = [tiny.picture(1, 84), tiny.picture(2, 84)]
        patches, grid = preprocess(images, examples.config, size)
        shown = references_of(patches, grid, examples.config)
        again, _ = preprocess(shown, examples.config, size)
        assert len(shown) == 2
        assert torch.allclose(patches, again, atol=1e-5)


def test_precomputed_latents_are_used_as_they_are(
    base_folder: Path, tmp_path: Path, examples: tiny.TinyExamples
) -> None:
    run = run_of(tiny.settings(base_folder, tmp_path), examples)
    batch = examples.batch(range(2))
    _, _, draw = randomness(batch, run.base)
    latents = run.base.encode_pictures(batch.pixels, draw)
    given = dataclasses.replace(batch, pixels=None, latents=latents)
    assert torch.equal(run.loss(batch), run.loss(given))
