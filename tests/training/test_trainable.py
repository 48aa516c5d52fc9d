"""Parameters of each stage, and outputs of the trained modules compared with the loaded model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import easyref_core as er
from easyref_core.checkpoint.checkpoint import save
from easyref_core.training.base_model import BaseModel
from easyref_core.training.batches import Batch
from easyref_core.training.initial import Weights, from_base
from easyref_core.training.stages import GROUPS, STAGES, Stage, group_of
from easyref_core.training.trainable import TrainableEasyRef, tensor_name

from . import tiny

EXACT = 1e-5


def weights_of(base: BaseModel, stage: Stage, **sizes: int) -> Weights:
    rank = 4 if "lora" in stage.trains else 0
    return from_base(tiny.MLLM, base.unet, **{"num_tokens": tiny.TOKENS, "lora_rank": rank} | sizes)


def trainable(base: BaseModel, name: str = "multi_reference", **options: object) -> TrainableEasyRef:
    """A model whose LoRA does something."""
    model = TrainableEasyRef(
        base.unet, weights_of(base, STAGES[name]), STAGES[name], tiny.image_token(), **options
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("up.weight"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def groups() -> Batch:
    """Groups of 1, 2 and 3 references and prompts of different lengths."""
    examples = tiny.TinyExamples(tiny.config(), groups=3)
    batch = examples.batch(range(3))
    assert sorted(batch.references) == [1, 2, 3]
    assert not batch.real.all()
    return batch


def noisy(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = len(batch.prompts)
    return torch.randn(rows, 4, 8, 8, generator=generator), torch.tensor([10, 500, 900])[:rows]


def predict(model: TrainableEasyRef, base: BaseModel, batch: Batch) -> torch.Tensor:
    return model(*noisy(batch), base.encode_text(batch.prompts), batch)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    assert found.shape == wanted.shape
    return ((found - wanted).norm() / wanted.norm()).item() <= EXACT


class TestStages:
    """Exactly the named parameters are trained."""

    @pytest.mark.parametrize("name", STAGES)
    def test_gradients_reach_the_stage_s_parameters_and_no_others(self, base: BaseModel, name: str) -> None:
        model = trainable(base, name)
        predict(model, base, groups()).square().mean().backward()
        stage = STAGES[name]
        modules = {
            "encoder": model.encoder,
            "aggregator": model.aggregator,
            "kv": model.kv,
            "lora": model.lora,
        }
        parameters = {
            tensor_name(f"{prefix}.{inner}"): parameter
            for prefix, module in modules.items()
            for inner, parameter in module.named_parameters()
        }
        with_gradient = {group_of(n) for n, p in parameters.items() if p.grad is not None and p.grad.any()}
        assert with_gradient == stage.trains
        without = [n for n, p in parameters.items() if group_of(n) in stage.trains and p.grad is None]
        assert without == []
        frozen = [base.unet, base.vae, base.text_encoder, base.text_encoder_2]
        assert all(p.grad is None and not p.requires_grad for part in frozen for p in part.parameters())

    @pytest.mark.parametrize("name", STAGES)
    def test_what_is_frozen_is_no_parameter(self, base: BaseModel, name: str) -> None:
        model = trainable(base, name)
        groups = {group_of(tensor_name(name)) for name, _ in model.named_parameters()}
        assert groups == STAGES[name].trains

    def test_every_group_of_tensors_is_known(self, base: BaseModel) -> None:
        weights = weights_of(base, STAGES["multi_reference"])
        assert {group_of(name) for name in weights.tensors} == set(GROUPS)

    def test_the_last_stages_train_more_than_the_first(self) -> None:
        assert STAGES["alignment"].trains < STAGES["single_reference"].trains
        assert STAGES["single_reference"].trains == STAGES["multi_reference"].trains == set(GROUPS)


class TestInitialWeights:
    def test_kv_are_the_unet_s_own(self, base: BaseModel) -> None:
        weights = weights_of(base, STAGES["alignment"])
        for number, site in enumerate(weights.sites):
            attn2 = base.unet.get_submodule(f"{site.diffusers}.attn2")
            assert torch.equal(weights.tensors[f"kv.to_k_ip.{number}.weight"], attn2.to_k.weight)
            assert torch.equal(weights.tensors[f"kv.to_v_ip.{number}.weight"], attn2.to_v.weight)

    def test_the_final_norm_is_a_copy_of_the_mllm_s(self, base: BaseModel) -> None:
        tensors = weights_of(base, STAGES["alignment"]).tensors
        mine, its = tensors["aggregator.norm.weight"], tensors["encoder.norm.weight"]
        assert torch.equal(mine, its)
        assert mine.data_ptr() != its.data_ptr()

    def test_one_seed_gives_one_model(self, base: BaseModel) -> None:
        first, again, other = (
            from_base(tiny.MLLM, base.unet, num_tokens=6, lora_rank=4, seed=seed).tensors
            for seed in (0, 0, 1)
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        drawn = {name for name in first if not torch.equal(first[name], other[name])}
        assert {group_of(name) for name in drawn} == {"reference_tokens", "projector", "lora"}

    def test_a_fresh_lora_changes_nothing(self, base: BaseModel) -> None:
        tensors = weights_of(base, STAGES["multi_reference"]).tensors
        ups = [tensor for name, tensor in tensors.items() if name.endswith("lora.up.weight")]
        assert len(ups) == 17 * 8
        assert not any(up.any() for up in ups)

    @pytest.mark.parametrize(("final_layers", "num_tokens"), [(1, 6), (2, 6), (3, 12)])
    def test_insertion_layer_and_token_count_are_settings(
        self, base: BaseModel, tmp_path: Path, final_layers: int, num_tokens: int
    ) -> None:
        weights = from_base(tiny.MLLM, base.unet, num_tokens=num_tokens, final_layers=final_layers)
        save(tmp_path / "model.safetensors", weights.config, weights.sites, weights.tensors)
        model = er.load(tmp_path / "model.safetensors", tiny.MLLM)
        assert (model.config.body_layers, model.config.final_layers) == (4 - final_layers, final_layers)
        tokens = model.aggregate(model.encode([tiny.picture(0)], size=tiny.REFERENCE))
        assert tokens.shape == (1, num_tokens, 32)

    def test_an_impossible_insertion_layer_is_refused(self, base: BaseModel) -> None:
        with pytest.raises(ValueError, match=r"final_layers is 4; the MLLM has 4 layers, wanted 1 to 3"):
            from_base(tiny.MLLM, base.unet, final_layers=4)


class TestSameAsTheLoadedModel:
    """A padded batch of different groups is each group alone, through er.load and the diffusers UNet."""

    @pytest.fixture
    def pair(self, base: BaseModel, tmp_path: Path) -> tuple[TrainableEasyRef, er.EasyRef]:
        model = trainable(base)
        tensors = {tensor_name(name): tensor for name, tensor in model.state_dict().items()}
        save(tmp_path / "model.safetensors", model.config, model.sites, tensors)
        return model, er.load(tmp_path / "model.safetensors", tiny.MLLM)

    def test_tokens_and_noise(self, base: BaseModel, pair: tuple[TrainableEasyRef, er.EasyRef]) -> None:
        model, loaded = pair
        batch = groups()
        with torch.no_grad():
            tokens, found = model.tokens(batch), predict(model, base, batch)
        model.attachment.remove()
        text, (latents, timesteps) = base.encode_text(batch.prompts), noisy(batch)
        for row, (images, prompt) in enumerate(tiny.TinyExamples(tiny.config(), groups=3).pictures(range(3))):
            alone = loaded.aggregate(loaded.encode(images, prompt, size=tiny.REFERENCE))
            assert close(tokens[row : row + 1], torch.Tensor(alone))
            attached = er.diffusers_unet.apply(base.unet, loaded, alone, None)
            one = slice(row, row + 1)
            sizes = {"text_embeds": text.pooled[one], "time_ids": batch.time_ids[one]}
            with torch.no_grad():
                wanted = base.unet(
                    latents[one], timesteps[one], text.states[one], added_cond_kwargs=sizes
                ).sample
            attached.remove()
            assert close(found[one], wanted)

    def test_each_reference_alone_is_averaged(
        self, base: BaseModel, pair: tuple[TrainableEasyRef, er.EasyRef]
    ) -> None:
        model, loaded = pair
        model.aggregation = "average"
        with torch.no_grad():
            tokens = model.tokens(groups())
        for row, each in enumerate(self.alone(loaded)):
            assert close(tokens[row], each.mean(dim=0))

    def test_each_reference_alone_is_concatenated(
        self, base: BaseModel, pair: tuple[TrainableEasyRef, er.EasyRef]
    ) -> None:
        """Groups of 1, 2 and 3 in one batch: what fills up the shorter ones is not attended to."""
        model, loaded = pair
        model.aggregation = "concatenation"
        batch = groups()
        with torch.no_grad():
            (tokens, real), found = model.padded_tokens(batch), predict(model, base, batch)
        model.attachment.remove()
        text, (latents, timesteps) = base.encode_text(batch.prompts), noisy(batch)
        for row, each in enumerate(self.alone(loaded)):
            joined = each.flatten(0, 1)
            assert real[row].sum() == len(joined) == tiny.TOKENS * batch.references[row]
            assert close(tokens[row][real[row]], joined)
            one = slice(row, row + 1)
            attached = er.diffusers_unet.apply(base.unet, loaded, joined[None], None)
            sizes = {"text_embeds": text.pooled[one], "time_ids": batch.time_ids[one]}
            with torch.no_grad():
                wanted = base.unet(
                    latents[one], timesteps[one], text.states[one], added_cond_kwargs=sizes
                ).sample
            attached.remove()
            assert close(found[one], wanted)

    @staticmethod
    def alone(loaded: er.EasyRef) -> list[torch.Tensor]:
        """Per group the tokens (K, T, C) of its references, each asked about alone."""
        examples = tiny.TinyExamples(tiny.config(), groups=3)
        return [
            torch.cat(
                [
                    torch.Tensor(loaded.aggregate(loaded.encode([image], prompt, size=tiny.REFERENCE)))
                    for image in images
                ]
            )
            for images, prompt in examples.pictures(range(3))
        ]


def test_checkpointing_gives_the_same_gradients(base_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = BaseModel.load(base_folder)
        model = trainable(base, gradient_checkpointing=checkpointing)
        predict(model, base, groups()).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, checkpointed = gradients
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-7) for name in plain)


def test_an_unknown_aggregation_is_refused(base: BaseModel) -> None:
    with pytest.raises(
        ValueError, match="aggregation is 'sum'; wanted one of easyref, average, concatenation"
    ):
        trainable(base, aggregation="sum")
