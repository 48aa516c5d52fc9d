"""The trained parameters of each stage, initial weights, and equality with the loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import easyref_core as er
from easyref_core.checkpoint.checkpoint import save
from easyref_core.training.base_model import BaseModel
from easyref_core.training.batches import Batch
from easyref_core.training.initial import Weights, from_base
from easyref_core.training.stages import GROUPS, STAGES, group_of
from easyref_core.training.trainable import TrainableEasyRef, tensor_name

from . import tiny

Images = list[tuple[list, str]]


def initial_weights(base: BaseModel, stage: str = "alignment", **options: int) -> Weights:
    rank = 4 if "lora" in STAGES[stage].trains else 0
    return from_base(tiny.MLLM, base.unet, **{"num_tokens": tiny.TOKENS, "lora_rank": rank} | options)


def trainable(base: BaseModel, stage: str = "multi_reference", **options: object) -> TrainableEasyRef:
    """A model whose LoRA is not zero."""
    weights = initial_weights(base, stage)
    model = TrainableEasyRef(base.unet, weights, STAGES[stage], tiny.image_token(), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("up.weight"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Groups of 1, 2 and 3 references and prompts of different lengths."""
    batch = tiny.TinyExamples(tiny.config(), groups=3).batch(range(3))
    assert sorted(batch.references) == [1, 2, 3]
    assert not batch.padding_mask.all()
    return batch


@pytest.fixture(scope="module")
def groups() -> Images:
    """The references and prompts of `batch`."""
    return tiny.TinyExamples(tiny.config(), groups=3).images(range(3))


def noisy() -> tuple[torch.Tensor, torch.Tensor]:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return latents, torch.tensor([10, 500, 900])


def predict(model: TrainableEasyRef, base: BaseModel, batch: Batch) -> torch.Tensor:
    return model(*noisy(), base.encode_text(batch.prompts), batch)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


class TestStages:
    @pytest.mark.parametrize("stage", STAGES)
    def test_gradients_reach_exactly_the_parameters_of_the_stage(
        self, base: BaseModel, batch: Batch, stage: str
    ) -> None:
        model, trains = trainable(base, stage), STAGES[stage].trains
        predict(model, base, batch).square().mean().backward()
        modules = {name: getattr(model, name) for name in ("encoder", "aggregator", "kv", "lora")}
        parameters = {
            tensor_name(f"{prefix}.{inner}"): parameter
            for prefix, module in modules.items()
            for inner, parameter in module.named_parameters()
        }
        assert {group_of(n) for n, p in parameters.items() if p.grad is not None and p.grad.any()} == trains
        assert [n for n, p in parameters.items() if group_of(n) in trains and p.grad is None] == []
        frozen = [base.unet, base.vae, base.text_encoder, base.text_encoder_2]
        assert all(p.grad is None and not p.requires_grad for part in frozen for p in part.parameters())
        assert {group_of(tensor_name(name)) for name, _ in model.named_parameters()} == trains

    def test_every_tensor_has_a_group(self, base: BaseModel) -> None:
        weights = initial_weights(base, "multi_reference")
        assert {group_of(name) for name in weights.tensors} == set(GROUPS)

    def test_later_stages_train_more_than_the_first(self) -> None:
        assert STAGES["alignment"].trains < STAGES["single_reference"].trains
        assert STAGES["single_reference"].trains == STAGES["multi_reference"].trains == set(GROUPS)


class TestInitialWeights:
    def test_kv_and_final_norm_are_copies(self, base: BaseModel) -> None:
        weights = initial_weights(base)
        for number, site in enumerate(weights.sites):
            attn2 = base.unet.get_submodule(f"{site.diffusers}.attn2")
            assert torch.equal(weights.tensors[f"kv.to_k_ip.{number}.weight"], attn2.to_k.weight)
            assert torch.equal(weights.tensors[f"kv.to_v_ip.{number}.weight"], attn2.to_v.weight)
        copy, norm = (weights.tensors[f"{module}.norm.weight"] for module in ("aggregator", "encoder"))
        assert torch.equal(copy, norm)
        assert copy.data_ptr() != norm.data_ptr()

    def test_random_weights_follow_from_the_seed(self, base: BaseModel) -> None:
        first, again, other = (
            initial_weights(base, "multi_reference", seed=seed).tensors for seed in (0, 0, 1)
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        random = {name for name in first if not torch.equal(first[name], other[name])}
        assert {group_of(name) for name in random} == {"reference_tokens", "projector", "lora"}

    def test_initial_lora_has_no_effect(self, base: BaseModel) -> None:
        tensors = initial_weights(base, "multi_reference").tensors
        ups = [tensor for name, tensor in tensors.items() if name.endswith("lora.up.weight")]
        assert len(ups) == 17 * 8
        assert not any(up.any() for up in ups)

    @pytest.mark.parametrize(("final_layers", "num_tokens"), [(1, 6), (2, 6), (3, 12)])
    def test_final_layers_and_token_count_are_settings(
        self, base: BaseModel, tmp_path: Path, final_layers: int, num_tokens: int
    ) -> None:
        weights = initial_weights(base, num_tokens=num_tokens, final_layers=final_layers)
        save(tmp_path / "model.safetensors", weights.config, weights.sites, weights.tensors)
        model = er.load(tmp_path / "model.safetensors", tiny.MLLM)
        assert (model.config.body_layers, model.config.final_layers) == (4 - final_layers, final_layers)
        tokens = model.aggregate(model.encode([tiny.random_image(0)], size=tiny.REFERENCE))
        assert tokens.shape == (1, num_tokens, 32)

    def test_too_many_final_layers_are_refused(self, base: BaseModel) -> None:
        message = "final_layers is 4, but the MLLM has 4 layers. Set final_layers to 1 to 3"
        with pytest.raises(ValueError, match=message):
            initial_weights(base, final_layers=4)


class TestEqualityWithTheLoadedModel:
    """A padded batch of groups equals each group alone through er.load and the diffusers UNet."""

    @pytest.mark.parametrize("aggregation", ["easyref", "average", "concatenation"])
    def test_tokens_and_noise(
        self, base: BaseModel, tmp_path: Path, batch: Batch, groups: Images, aggregation: str
    ) -> None:
        model = trainable(base, aggregation=aggregation)
        tensors = {tensor_name(name): tensor for name, tensor in model.state_dict().items()}
        save(tmp_path / "model.safetensors", model.config, model.sites, tensors)
        loaded = er.load(tmp_path / "model.safetensors", tiny.MLLM)
        with torch.no_grad():
            (tokens, mask), actual = model.tokens_and_mask(batch), predict(model, base, batch)
        model.attachment.remove()
        assert (mask is not None) == (aggregation == "concatenation")
        for row, (images, prompt) in enumerate(groups):
            expected = self.tokens(loaded, images, prompt, aggregation)
            assert_close(tokens[row] if mask is None else tokens[row][mask[row]], expected[0])
            assert_close(actual[row : row + 1], self.noise(base, loaded, batch, row, tokens=expected))

    @staticmethod
    def tokens(loaded: er.EasyRef, images: list, prompt: str, aggregation: str) -> torch.Tensor:
        """Reference tokens (1, T, C) of one group."""

        def encode(images: list) -> torch.Tensor:
            return torch.Tensor(loaded.aggregate(loaded.encode(images, prompt, size=tiny.REFERENCE)))

        if aggregation == "easyref":
            return encode(images)
        each = torch.cat([encode([image]) for image in images])
        return each.mean(dim=0, keepdim=True) if aggregation == "average" else each.flatten(0, 1)[None]

    @staticmethod
    def noise(
        base: BaseModel, loaded: er.EasyRef, batch: Batch, row: int, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Noise (1, 4, h, w) that the diffusers UNet predicts for one row under reference tokens."""
        one, text, (latents, timesteps) = slice(row, row + 1), base.encode_text(batch.prompts), noisy()
        sizes = {"text_embeds": text.pooled[one], "time_ids": batch.time_ids[one]}
        attached = er.diffusers_unet.apply(base.unet, loaded, tokens, None)
        with torch.no_grad():
            output = base.unet(latents[one], timesteps[one], text.states[one], added_cond_kwargs=sizes)
        attached.remove()
        return output.sample


def test_precomputed_context_is_used(base: BaseModel, batch: Batch) -> None:
    model = trainable(base, "alignment")
    context = model.context(batch.patches, batch.grid, batch.input_ids, batch.padding_mask)
    assert torch.equal(model.tokens(batch, context), model.tokens(batch))
    assert not torch.equal(model.tokens(batch, context + 1), model.tokens(batch))


def test_checkpointing_computes_twice_and_gives_the_same_gradients(base_folder: Path, batch: Batch) -> None:
    gradients = []
    for checkpointing in (False, True):
        base, calls = BaseModel.load(base_folder), []
        base.unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model = trainable(base, gradient_checkpointing=checkpointing)
        predict(model, base, batch).square().mean().backward()
        assert not base.unet.training
        assert len(calls) == 1 + checkpointing
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, checkpointed = gradients
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-7) for name in plain)


def test_unknown_aggregation_is_refused(base: BaseModel) -> None:
    message = "aggregation is 'sum', expected one of easyref, average, concatenation"
    with pytest.raises(ValueError, match=message):
        trainable(base, aggregation="sum")
