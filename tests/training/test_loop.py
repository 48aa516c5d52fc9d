"""The loop: updates are exact, the loss falls, stages chain, and checkpoints load."""

from __future__ import annotations

import dataclasses
import json
import math
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import easyref_core as er
import easyref_core.training
from easyref_core.mllm.preprocess import preprocess
from easyref_core.training.base_model import BaseModel
from easyref_core.training.batches import MicroBatches, loader
from easyref_core.training.config import Samples, load
from easyref_core.training.initial import from_checkpoint
from easyref_core.training.loop import make_accelerator, train
from easyref_core.training.resume import saved_states
from easyref_core.training.run import DATASETS, Run, configure_deepspeed, learning_rate, randomness
from easyref_core.training.run_log import read_metrics
from easyref_core.training.sampling import generate_images, unpatchify
from easyref_core.training.stages import STAGES
from easyref_core.utils.finite import NotFiniteError

from . import tiny
from .tiny import MakeSettings, TinyExamples, Train

CONFIGS = Path(easyref_core.training.__file__).parent / "configs"
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(settings: MakeSettings, examples: TinyExamples) -> MakeRun:
    def make(**changes: Any) -> Run:
        run_settings = settings(**changes)
        return Run(run_settings, make_accelerator(run_settings.accumulation), examples)

    return make


def trained(run: Run) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}


class TestUpdate:
    def test_update_is_adamw_by_hand(self, make_run: MakeRun, examples: TinyExamples) -> None:
        """m and v of the first step are the gradient and its square: the step is rate * g / (|g| + eps)."""
        run, batch = make_run(learning_rate=1e-3), examples.batch(range(2))
        before = {name: parameter.detach().clone() for name, parameter in trained(run).items()}
        timesteps, noise, draw = randomness(batch, run.base)
        mean, deviation = run.base.latent_moments(batch.pixels)
        signal = run.base.schedule.alphas_cumprod[timesteps][:, None, None, None]
        noisy = signal.sqrt() * (mean + deviation * draw) + (1 - signal).sqrt() * noise
        predicted = run.model(noisy, timesteps, run.base.encode_text(batch.prompts), batch)
        loss = ((predicted - noise) ** 2).mean()
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in trained(run).items()}
        run.model.zero_grad()
        actual, norm = run.update(iter([batch]), 0, measure=True)
        assert math.isclose(actual.item(), loss.item(), rel_tol=1e-6)
        squares = sum(gradient.square().sum() for gradient in gradients.values())
        assert math.isclose(float(norm), float(squares.sqrt()), rel_tol=1e-5)
        for name, after in trained(run).items():
            expected = before[name] - 1e-3 * gradients[name] / (gradients[name].abs() + 1e-8)
            assert torch.allclose(after, expected, atol=1e-7, rtol=1e-5), name

    def test_accumulated_micro_batches_equal_one_batch(
        self, make_run: MakeRun, examples: TinyExamples
    ) -> None:
        gradients = []
        for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
            run = make_run(batch_size=batch_size, accumulation=accumulation)
            for batch in loader(MicroBatches(examples, batch_size), range(accumulation)):
                with run.accelerator.accumulate(run.prepared):
                    run.accelerator.backward(run.loss(batch))
            gradients.append({name: parameter.grad for name, parameter in trained(run).items()})
        for name, expected in gradients[0].items():
            limit = 1e-4 * expected.norm() + 1e-9
            assert all((g[name] - expected).norm() <= limit for g in gradients), name

    def test_noise_and_timestep_follow_from_the_sample_seed(
        self, base: BaseModel, examples: TinyExamples
    ) -> None:
        together = randomness(examples.batch(range(4)), base)
        alone = [randomness(examples.batch(range(i, i + 1)), base) for i in range(4)]
        for batch, rows in zip(together, zip(*alone, strict=True), strict=True):
            assert torch.equal(batch, torch.cat(rows))
        assert len(set(together[0].tolist())) > 1

    def test_precomputed_latents_are_used(self, make_run: MakeRun, examples: TinyExamples) -> None:
        run, batch = make_run(), examples.batch(range(2))
        latents = run.latents(batch, randomness(batch, run.base)[2])
        precomputed = dataclasses.replace(batch, pixels=None, latents=latents)
        assert torch.equal(run.loss(batch), run.loss(precomputed))

    def test_loss_falls_on_a_fixed_set(self, make_run: MakeRun, examples: TinyExamples) -> None:
        run = make_run(**tiny.GOLDEN_START, learning_rate=1e-2, batch_size=4)
        batch = examples.batch(range(4))
        losses = [run.update(iter([batch]), number, measure=False)[0].item() for number in range(30)]
        assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize(("clip", "expected"), [(None, 0.0), (1.0, 1.0)])
def test_deepspeed_clips_as_the_settings_do(
    settings: MakeSettings, clip: float | None, expected: float
) -> None:
    plugin = SimpleNamespace(deepspeed_config={"gradient_clipping": "auto"})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    configure_deepspeed(accelerator, settings(clip=clip, batch_size=2, accumulation=3))
    assert plugin.deepspeed_config == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": expected,
    }


class TestNotFinite:
    """A run that diverges stops, keeps its good states and exports nothing."""

    def test_a_loss(self, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train_tiny(updates=2, save_every=1)
        (tmp_path / "easyref.safetensors").unlink()
        update = Run.update
        monkeypatch.setattr(
            Run,
            "update",
            lambda self, *args, **options: (torch.tensor(math.nan), update(self, *args, **options)[1]),
        )
        message = (
            r"^alignment, update 3: the loss is not finite .*Lower learning_rate, set clip to 1.0[^\n]*$"
        )
        with pytest.raises(NotFiniteError, match=message):
            train_tiny(updates=4, save_every=1)
        assert list(saved_states(tmp_path)) == [1, 2]
        assert not (tmp_path / "easyref.safetensors").exists()

    def test_a_trained_weight(
        self, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At an update that is saved but not logged."""
        step = torch.optim.AdamW.step

        def break_weights(self: torch.optim.Optimizer, *args: Any, **options: Any) -> None:
            step(self, *args, **options)
            if next(iter(self.state.values()))["step"] == 3:
                self.param_groups[0]["params"][0].data.view(-1)[0] = math.inf

        monkeypatch.setattr(torch.optim.AdamW, "step", break_weights)
        message = r"alignment, after 3 updates: a trained weight is not finite \(1 values"
        with pytest.raises(NotFiniteError, match=message):
            train_tiny(updates=4, save_every=1, log_every=4)
        assert list(saved_states(tmp_path)) == [1, 2]
        assert not (tmp_path / "easyref.safetensors").exists()

    def test_a_value_beyond_float16(self, make_run: MakeRun, tmp_path: Path) -> None:
        run = make_run(save_dtype="float16")
        trained(run).popitem()[1].data.view(-1)[0] = 1e5
        with pytest.raises(NotFiniteError, match="checkpoint in float16: a weight is not .* Set save_dtype"):
            run.save(tmp_path / "easyref.safetensors")
        assert not (tmp_path / "easyref.safetensors").exists()


@pytest.fixture(scope="module")
def chain(
    base_folder: Path, tmp_path_factory: pytest.TempPathFactory, examples: TinyExamples
) -> dict[str, Path]:
    """Checkpoints of one update of each stage, each started from the previous one."""
    folder, results = tmp_path_factory.mktemp("chain"), {}
    for name, stage in STAGES.items():
        changes = {"stage": name, "start": results.get(stage.starts_from), "learning_rate": 1e-2}
        results[name] = train(tiny.settings(base_folder, output=folder / name, **changes), examples)
    return results


class TestStages:
    @pytest.mark.parametrize("name", STAGES)
    def test_checkpoint_loads(self, chain: dict[str, Path], name: str) -> None:
        model = er.load(chain[name], tiny.MLLM)
        assert model.config.num_tokens == tiny.TOKENS
        assert model.config.lora_rank == (4 if "lora" in STAGES[name].trains else 0)
        tokens = model.aggregate(model.encode([tiny.random_image(0)], "a", size=tiny.REFERENCE))
        assert tokens.shape == (1, tiny.TOKENS, 32)

    def test_first_stage_omits_the_body(self, base: BaseModel, chain: dict[str, Path]) -> None:
        prefixes = {name: {key.split(".")[0] for key in load_file(path)} for name, path in chain.items()}
        assert prefixes["alignment"] == {"mllm_final_layer", "image_proj_model", "unet"}
        assert prefixes["multi_reference"] == prefixes["alignment"] | {"multimodal_llm"}
        assert from_checkpoint(chain["alignment"], tiny.MLLM, base.unet).body_is_base
        assert not from_checkpoint(chain["multi_reference"], tiny.MLLM, base.unet).body_is_base

    def test_each_stage_continues_the_previous_one(self, base: BaseModel, chain: dict[str, Path]) -> None:
        """A step of AdamW moves a weight by at most the learning rate."""
        stages = [from_checkpoint(path, tiny.MLLM, base.unet).tensors for path in chain.values()]
        for earlier, later in zip(stages, stages[1:], strict=False):
            steps = {name: (later[name] - tensor).abs().max().item() for name, tensor in earlier.items()}
            assert 0.5e-2 < max(steps.values()) <= 1.001e-2

    def test_first_stage_after_others_keeps_their_body_and_lora(
        self, train_tiny: Train, chain: dict[str, Path]
    ) -> None:
        result = train_tiny(start=chain["multi_reference"])
        before, after = load_file(chain["multi_reference"]), load_file(result)
        assert before.keys() == after.keys()
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {name for name in before if name.startswith("multimodal_llm.") or "_lora." in name}

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ({"num_tokens": 7}, "has num_tokens 6, but the settings have 7. Set num_tokens: 6"),
            ({"lora_rank": 8}, "has a LoRA of rank 4, but the settings have lora_rank 8. Set lora_rank: 4"),
        ],
    )
    def test_sizes_other_than_the_checkpoints_are_refused(
        self, make_run: MakeRun, chain: dict[str, Path], size: dict[str, int], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            make_run(stage="multi_reference", start=chain["single_reference"], **size)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_checkpoint_in_half_precision(self, train_tiny: Train, dtype: str) -> None:
        result = train_tiny(save_dtype=dtype)
        assert {tensor.dtype for tensor in load_file(result).values()} == {getattr(torch, dtype)}
        er.load(result, tiny.MLLM)


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.name)
def test_every_yaml_runs_a_tiny_update(
    base_folder: Path, tmp_path: Path, examples: TinyExamples, file: Path
) -> None:
    for settings in load(file):
        augmentation = dataclasses.replace(settings.data.augmentation, size=tiny.REFERENCE)
        settings = dataclasses.replace(
            settings,
            base=base_folder,
            mllm=tiny.MLLM,
            output=tmp_path / settings.stage,
            data=dataclasses.replace(settings.data, augmentation=augmentation),
            start=settings.start and tiny.GOLDEN_START["start"],
            samples=dataclasses.replace(settings.samples, steps=1, count=1),
            **{"updates": 1, "num_tokens": 8, "lora_rank": 8, "batch_size": 1, "workers": 0},
            **{"optimizer": "adamw", "precomputed": None},  # need a package and rows
        )
        er.load(train(settings, examples), tiny.MLLM)
        assert len(list((settings.output / "samples").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "trackers has 'tensorbord', expected one of .*tensorboard"),
        ("swanlab", "trackers has 'swanlab', whose package is not installed. Run pip install swanlab"),
    ],
)
def test_trackers_that_cannot_be_used_are_named(train_tiny: Train, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tiny(trackers={name: {}})


def test_checkpoints_and_states_of_the_way_are_retained(train_tiny: Train, tmp_path: Path) -> None:
    rules = {"save_every": 1, "keep": 1, "keep_every": 2, "export_every": 2}
    train_tiny(updates=5, **rules, learning_rate=1e-2)
    assert list(saved_states(tmp_path)) == [2, 4, 5]
    exported = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert exported == ["easyref-2.safetensors", "easyref-4.safetensors", "easyref.safetensors"]
    train_tiny(output=tmp_path / "shorter", updates=2, learning_rate=1e-2)
    one, other = (load_file(tmp_path / name) for name in (exported[0], "shorter/easyref.safetensors"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_profiler_writes_a_trace_of_the_updates(train_tiny: Train, tmp_path: Path) -> None:
    train_tiny(updates=4, profile_updates=1)
    [trace] = (tmp_path / "profile").glob("process0.*.pt.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "ProfilerStep#2" in names
    assert "ProfilerStep#3" not in names
    assert any(str(name).startswith("aten::") for name in names)


def test_run_log(train_tiny: Train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_tiny(updates=3, samples=Samples(every=2, count=2, steps=2))
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) and value > 0 for row in rows for value in row.values())
    board = EventAccumulator(str(tmp_path / "tensorboard" / "easyref"))
    board.Reload()
    losses = [(event.step, round(event.value, 4)) for event in board.Scalars("loss")]
    assert losses == [(row["update"], round(row["loss"], 4)) for row in rows]
    assert set(board.Tags()["scalars"]) == rows[0].keys() - {"update"}
    assert [event.step for event in board.Images("samples")] == [2, 3]
    sheets = sorted((tmp_path / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["0000002.png", "0000003.png"]
    assert Image.open(sheets[0]).size > (300, 200)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize(("stage", "cached"), [("alignment", True), *((stage, False) for stage in STAGES)])
def test_frozen_weights_are_bfloat16_and_trained_ones_float32(
    make_run: MakeRun, tmp_path: Path, examples: TinyExamples, stage: str, cached: bool
) -> None:
    start = {} if stage == "alignment" else {**tiny.GOLDEN_START, "stage": stage}
    cache = {"cache": tmp_path / "cache"} if cached else {}
    samples = Samples(every=1, count=1, steps=1)
    run = make_run(**start, **cache, samples=samples, gradient_checkpointing=True)
    assert run.base.unet.dtype == torch.bfloat16
    body_dtype = torch.bfloat16 if STAGES[stage].body_frozen else torch.float32
    assert run.model.encoder.norm.weight.dtype == body_dtype
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    train(run.settings, examples)
    [row] = read_metrics(tmp_path / "metrics.csv")
    assert math.isfinite(row["loss"])


@pytest.mark.parametrize("aggregation", ["average", "concatenation"])
def test_other_aggregations_train_and_generate(train_tiny: Train, tmp_path: Path, aggregation: str) -> None:
    train_tiny(aggregation=aggregation, samples=Samples(every=1, count=2, steps=2))
    assert (tmp_path / "samples" / "0000001.png").is_file()


def test_cache_does_not_change_the_result(train_tiny: Train, tmp_path: Path, examples: TinyExamples) -> None:
    """Two epochs; in the second, latents and context states come from the cache."""
    plain, cached = (
        load_file(train_tiny(output=tmp_path / name, updates=8, cache=cache))
        for name, cache in (("plain", None), ("cached", tmp_path / "cache"))
    )
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 * len(examples)
    # Compared by norm, because Adam turns a gradient of pure rounding error into a full step, so that on some
    # processors a few weights differ by half a step.
    assert all((plain[name] - cached[name]).norm() <= 1e-3 * plain[name].norm() for name in plain)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate(settings: MakeSettings, schedule: str, expected: list[float]) -> None:
    run = settings(schedule=schedule, updates=6, warmup=2, learning_rate=2.0)
    rates = [learning_rate(run, 2 + number) / 2 for number in range(len(expected))]
    assert rates == pytest.approx(expected, abs=1e-6)
    assert [learning_rate(run, number) for number in (0, 1)] == [1.0, 2.0]


@pytest.mark.parametrize("name", DATASETS.values())
def test_data_sets_are_found_by_name(name: str) -> None:
    assert callable(pkgutil.resolve_name(name))


class TestSampling:
    NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def test_guidance_1_ignores_the_negative_prompt(self, base: BaseModel) -> None:
        first, other = (
            generate_images(base, self.NOISE, ["abc", "de"], negative=negative, guidance=1.0, steps=3)
            for negative in ("x", "fgh")
        )
        assert [image.size for image in first] == [(64, 64)] * 2
        assert [image.tobytes() for image in first] == [image.tobytes() for image in other]

    def test_image_does_not_depend_on_its_batch(self, base: BaseModel) -> None:
        _, together = generate_images(base, self.NOISE, ["abc", "de"], steps=3)
        [alone] = generate_images(base, self.NOISE[1:], ["de"], steps=3)
        first, second = (
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()
            for image in (together, alone)
        )
        assert (first - second).abs().max() <= 1

    def test_unpatchify_inverts_patchify(self) -> None:
        config = tiny.config()
        patches, grid = preprocess([tiny.random_image(1, 84), tiny.random_image(2, 84)], config, 84)
        references = unpatchify(patches, grid, config)
        assert len(references) == 2
        assert torch.allclose(patches, preprocess(references, config, 84)[0], atol=1e-5)
