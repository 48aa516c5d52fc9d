"""Rows of a UNet batch as other packs arrange them: each attends by its side, its latent and its crop."""

from __future__ import annotations

from typing import Any

import comfy.sample
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from devkit.host import golden
from devkit.host.sampling import LEFT, PROMPTS, Easy, in_float64, sample_cfg
from devkit.host.tiny_nodes.tiny_sdxl import random_conditioning

from . import other_packs
from .other_packs import Tile

OTHER = random_conditioning(3, 77)
TILES = [Tile(top, left, 8, 8) for top in (0, 4, 8) for left in (0, 8)]  # of a 16 x 16 latent; they overlap
HALVES = torch.cat([LEFT, 1 - LEFT])
JOIN = {"method": "concat", "factor": 0.5, "weights": ""}


# Tiles


@in_float64
@pytest.mark.parametrize("settings", [{}, {"mask": LEFT}, {"weight_type": "style transfer precise"}])
def test_tiles_of_a_batch_are_those_of_one_at_a_time(easy, model, monkeypatch, settings: dict) -> None:
    applied = easy.apply(model, **settings)
    together = sample_cfg(other_packs.tiled(applied, TILES, 3))
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_: 0)  # each side in a call of its own
    assert golden.error(together, sample_cfg(other_packs.tiled(applied, TILES, 1))) <= 1e-5


def test_tiles_of_two_latents_have_the_tokens_of_their_latent(easy, model) -> None:
    batch, singles = easy.batched_tokens(2)
    together = sample_cfg(other_packs.tiled(easy.apply(model, tokens=batch), TILES, 3), batch=2)
    for i, tokens in enumerate(singles):
        alone = sample_cfg(other_packs.tiled(easy.apply(model, tokens=tokens), TILES, 1), batch=2)
        assert golden.error(together[i], alone[i]) <= 1e-5


@pytest.mark.parametrize("shift", [0, 3])
def test_mask_is_cut_with_the_tile(easy, model, log, shift: int) -> None:
    """A masked half of two tiles: the tile inside is that of no mask, the other that of weight 0."""
    tiles = [Tile(0, 0, 16, 8), Tile(0, 8, 16, 8)]
    # the left tile, once the latent is rolled back
    shifted = LEFT.roll(-shift, dims=-1)
    how = {"tiles": tiles, "batch": 2, "shift": shift}
    masked = sample_cfg(other_packs.tiled(easy.apply(model, mask=shifted), **how), steps=1)
    unmasked = (other_packs.tiled(easy.apply(model, weight), **how) for weight in (1.0, 0.0))
    everywhere, nowhere = (sample_cfg(each, steps=1) for each in unmasked)
    left = LEFT.roll(-shift, dims=-1).bool().expand_as(masked)
    assert golden.error(masked[left], everywhere[left]) <= 1e-5
    assert golden.error(masked[~left], nowhere[~left]) <= 1e-5
    assert golden.error(everywhere[left], nowhere[left]) > 1e-2
    assert not log.text


def test_mask_of_changed_tiles_is_warned_of_once(easy, model, log) -> None:
    changed = other_packs.tiled(easy.apply(model, mask=LEFT), TILES, 3, change=lambda tile: tile.flip(-1))
    sample_cfg(changed)
    assert log.text.count("stretched over each tile") == 1


def test_tiles_without_row_numbers_are_refused(easy, model) -> None:
    """A pack that drops unknown conditionings: the rows cannot be identified."""
    known = {"c_crossattn", "y", "transformer_options"}
    with pytest.raises(ValueError, match="Tiled Diffusion"):
        sample_cfg(other_packs.tiled(easy.apply(model), TILES, 3, keep=known.__contains__))


def test_a_tile_in_a_latent(pack) -> None:
    find = golden.part(pack, "nodes.unet_patch.batch_layout").find_tile
    latent = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    assert find(latent[:, 2:5, 3:7], latent) == (2, 3)
    assert find(latent.roll(-8, dims=-1)[:, :, :4], latent) == (0, 8)  # over the right edge
    assert find(latent[:, 2:5, 3:7] + 1e-3, latent) is None
    assert find(torch.ones(4, 2, 2), torch.ones(4, 6, 10)) is None  # everywhere
    assert find(latent[:, 2:5, 3:7], latent.repeat(1, 1, 2)) is None  # twice


@pytest.mark.parametrize("rows", [1, 2])
def test_latents_that_are_cut_without_their_conditionings(easy, model, rows: int) -> None:
    """One latent after the other, as a pack might sample them to save memory."""
    batch, _ = easy.batched_tokens(2)
    applied = easy.apply(model, tokens=batch if rows == 2 else easy.tokens)
    wanted = sample_cfg(applied, batch=2)

    def one_by_one(executor: Any, unet: Any, conds: list, x: Tensor, t: Tensor, options: dict) -> list:
        parts = [executor(unet, conds, x[i : i + 1], t[i : i + 1], options) for i in range(len(x))]
        return [torch.cat(side) for side in zip(*parts, strict=True)]

    applied.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "one by one", one_by_one)
    if rows == 1:
        assert golden.error(sample_cfg(applied, batch=2), wanted) <= 1e-5
    else:
        with pytest.raises(ValueError, match="a part of the latents without its conditionings"):
            sample_cfg(applied, batch=2)


# Attention couples

KEYS = ["cond_or_uncond_couple", "cond_or_uncond_hook_couple", None]


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("regions", [1, 2])
@pytest.mark.parametrize("key", KEYS)
def test_couple_of_the_same_prompt_changes_nothing(easy, model, key: str, regions: int, cfg: float) -> None:
    masks = torch.cat([HALVES[:1], HALVES[1:].expand(regions, -1, -1) / regions])
    couple = (model, [PROMPTS[0][0][0]] * regions, masks, key)
    batch, _ = easy.batched_tokens(2)
    for tokens in (easy.tokens, batch):
        found = sample_cfg(easy.apply(other_packs.coupled(*couple), tokens=tokens), cfg, batch=2)
        assert golden.error(found, sample_cfg(easy.apply(model, tokens=tokens), cfg, batch=2)) <= 1e-5


@pytest.mark.parametrize("key", KEYS)
def test_couple_adds_the_term_of_each_side_to_every_region(easy, model, key: str) -> None:
    """The term, added to the regions, is the same as the term added to their combination."""
    couple = other_packs.coupled(model, [OTHER[0][0]], HALVES, key)
    wanted = sample_cfg(with_terms_after(easy, couple))
    assert golden.error(sample_cfg(easy.apply(couple, lora=0.0)), wanted) <= 1e-5
    assert golden.error(sample_cfg(easy.apply(model, lora=0.0)), wanted) > 1e-2


def with_terms_after(easy: Easy, couple: ModelPatcher) -> ModelPatcher:
    """The model with the term added after its coupled attention, projected like the attention's output."""
    attention = golden.part(easy.pack, "easyref_core.unet.reference_attention").reference_attention
    positions = {tuple(site): i for i, site in enumerate(easy.easyref.model.checkpoint.sites)}
    unet = couple.model.diffusion_model
    queries: list[Tensor] = []

    def keep(n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple:
        queries.append(n)
        return n, context, value

    def add(n: Tensor, options: dict) -> Tensor:
        site = (*options["block"], options["block_index"])
        path = golden.part(easy.pack, "easyref_core.unet.layout").Site(*site).comfy
        attn2 = unet.get_submodule(f"{path}.attn2")
        k, v = easy.key_values[positions[site]]
        rows = [0 if role == 1 else 1 for role in options["cond_or_uncond"]]
        term = attention(attn2.to_q(queries.pop()), (k[rows], v[rows]), options["n_heads"])
        return n + attn2.to_out[0](term) - attn2.to_out[0].bias

    clone = couple.clone()
    clone.model_options["transformer_options"]["patches"]["attn2_patch"].insert(0, keep)
    clone.set_model_attn2_output_patch(add)
    return clone


# Rows one after the other


def test_row_after_row(easy, model) -> None:
    for settings in ({}, {"mask": LEFT}):
        applied = easy.apply(model, **settings)
        assert golden.error(sample_cfg(other_packs.row_after_row(applied)), sample_cfg(applied)) <= 1e-5


@pytest.mark.parametrize("style_rows", [1, 2])
def test_rows_of_style_guides_are_refused(easy, model, style_rows: int) -> None:
    """One such row for each of two sides makes as many queries as the batch has rows, of other sides."""
    with pytest.raises(ValueError, match="RES4LYF without style guides"):
        sample_cfg(other_packs.row_after_row(easy.apply(model), style_rows))


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_sides_that_a_wrapper_evaluates_one_by_one(easy, model, outside: bool, order: int) -> None:
    """It names them in cond_or_uncond, outside of Apply EasyRef's wrapper or inside of it."""

    def one_by_one(executor: Any, *args: Any, **more: Any) -> Tensor:
        *per_row, control, options = args
        roles = options["cond_or_uncond"]
        per_side = [part.chunk(len(roles)) for part in per_row]
        out = []
        for i in range(len(roles))[::order]:
            of_side = {**options, "cond_or_uncond": [roles[i]]}
            out.append(executor(*(part[i] for part in per_side), control, of_side, **more))
        return torch.cat(out[::order])

    batch, _ = easy.batched_tokens(2)
    kind = WrappersMP.DIFFUSION_MODEL
    before = model.clone()
    if outside:
        before.add_wrapper_with_key(kind, "one by one", one_by_one)
    for settings in ({}, {"tokens": batch, "mask": masks_of(2)}):
        applied = easy.apply(before, **settings)
        if not outside:
            applied.add_wrapper_with_key(kind, "one by one", one_by_one)
        wanted = sample_cfg(easy.apply(model, **settings), batch=2)
        assert golden.error(sample_cfg(applied, batch=2), wanted) <= 1e-5


def test_function_that_cuts_known_conditionings_only(easy, model) -> None:
    """Each side in a separate call, with unknown conditionings passed on unchanged."""

    def one_by_one(apply_model: Any, args: dict[str, Any]) -> Tensor:
        out, roles = [], args["cond_or_uncond"]
        for i, role in enumerate(roles):
            conds = dict(args["c"])
            conds |= {name: conds[name].chunk(len(roles))[i] for name in ("c_crossattn", "y")}
            conds["transformer_options"] = {**conds["transformer_options"], "cond_or_uncond": [role]}
            x, t = (args[name].chunk(len(roles))[i] for name in ("input", "timestep"))
            out.append(apply_model(x, t, **conds))
        return torch.cat(out)

    batch, _ = easy.batched_tokens(2)
    applied = easy.apply(model, tokens=batch)
    wanted = sample_cfg(applied, batch=2)
    applied.set_model_unet_function_wrapper(one_by_one)
    assert golden.error(sample_cfg(applied, batch=2), wanted) <= 1e-5


def test_rows_of_queries(pack) -> None:
    layout = golden.part(pack, "nodes.unet_patch.batch_layout")
    crop = golden.part(pack, "easyref_core.unet.masks").full_crop(16, 16)

    def rows(queries: int, latents: int, sides=2, tokens=16, calls=None, **options: Any) -> Any:
        of_latents = [(side, latent) for side in (True, False)[-sides:] for latent in range(latents)]
        batch = tuple(layout.Row(side, latent, latent, crop) for side, latent in of_latents)
        shape = layout.Queries(queries, tokens, (4, 4), calls or 0, calls is not None)
        return layout.rows_of_queries(shape, batch, options)

    assert rows(4, 2, cond_or_uncond=[1, 0]) is None
    assert rows(2, 2, cond_or_uncond=[0]) == (2, 3)
    assert rows(2, 2, cond_or_uncond=[1]) == (0, 1)
    assert rows(1, 1, calls=1, cond_or_uncond=[1, 0]) == (1,)
    assert rows(4, 1, tokens=8, cond_or_uncond=[1, 0]) == (0, 0, 1, 1)
    assert rows(6, 2, cond_or_uncond=[1, 0]) == (0, 1, 2, 3, 2, 3)
    assert rows(6, 2, cond_or_uncond=[0, 1]) == (0, 1, 0, 1, 2, 3)
    assert rows(4, 2, sides=1, cond_or_uncond=[0]) == (0, 1, 0, 1)
    for wrong in (
        {"queries": 3, "latents": 2},
        {"queries": 2, "latents": 2, "cond_or_uncond": [1, 0]},
        {"queries": 1, "latents": 1, "calls": 2},
        {"queries": 2, "latents": 1, "calls": 0},
        {"queries": 5, "latents": 2, "cond_or_uncond": [1, 0]},
        {"queries": 6, "latents": 2, "cond_or_uncond": [1, 0], "cond_or_uncond_couple": [1, 0, 0, 0]},
    ):
        with pytest.raises(ValueError, match="attention couples"):
            rows(**wrong)


def test_rows_of_key_values(pack) -> None:
    rows = golden.part(pack, "nodes.unet_patch.row_selection")
    layers = golden.part(pack, "easyref_core.unet.layer_weights")
    layout = golden.part(pack, "nodes.unet_patch.batch_layout")
    crop = golden.part(pack, "easyref_core.unet.masks").full_crop(16, 16)
    batch = [layout.Row(side, 0, frame, crop) for side in (True, False) for frame in (1, 1, 7, 7)]
    runs = rows.runs_of(batch, frames=3)
    assert runs == ((True, 1), (True, 2), (False, 1), (False, 2))
    selection = rows.select_rows(
        runs, (1, 3), [layers.DEFAULT_BRANCHES, layers.NEGATIVE_ONLY, layers.DEFAULT_BRANCHES]
    )
    assert selection.rows == (0, 2, 3)
    assert selection.positions == {
        layers.DEFAULT_BRANCHES: (0, 0, 1, 2),
        layers.NEGATIVE_ONLY: (1, 2, None, None),
    }
    nothing = rows.select_rows(runs[2:], (1, 3), [layers.NEGATIVE_ONLY])
    assert nothing == ((0,), {layers.NEGATIVE_ONLY: (None, None)})
    index = rows.RowIndex.of((2, None, 0), 3, torch.device("cpu"))
    assert index.gather(torch.tensor([[1.0], [2.0], [3.0]])).flatten().tolist() == [3, 0, 1]


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_nag_guides_the_text_and_the_term_is_added(easy, model, cfg: float) -> None:
    """Expected: the term of each side, added to the guided attention before its output projection."""
    applied = easy.apply(model, lora=0.0)
    found = {scale: sample_cfg(other_packs.nag(applied, OTHER[0][0], scale), cfg) for scale in (1.0, 3.0)}
    assert golden.error(found[1.0], sample_cfg(applied, cfg)) <= 1e-5
    assert golden.error(found[3.0], found[1.0]) > 1e-3

    guided = other_packs.nag(model, OTHER[0][0], 3.0)
    guided.set_model_attn2_patch(lambda *args: args[:3])
    assert golden.error(found[3.0], sample_cfg(with_terms_after(easy, guided), cfg)) <= 1e-5


def test_keys_of_more_rows_than_queries_are_refused_where_no_forward_is_set(easy, model) -> None:
    applied = easy.apply(model)
    applied.set_model_attn2_patch(lambda n, *key_value: (n, *(t.repeat(2, 1, 1) for t in key_value[:2])))
    with pytest.raises(ValueError, match="NAG"):
        sample_cfg(applied)


# Parts of a batch


@torch.inference_mode()
def sampled_as_ksampler(model: ModelPatcher, numbers: list[int]) -> Tensor:
    """As KSampler samples a latent whose batch_index is `numbers`."""
    latent = torch.zeros(len(numbers), 4, 16, 16)
    noise = comfy.sample.prepare_noise(latent, 5, numbers)
    settings = 2, 5.0, "euler", "normal", *PROMPTS, latent
    return comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=5)


def masks_of(count: int) -> Tensor:
    return torch.stack([torch.linspace(i / count, 1, 64).reshape(8, 8) for i in range(count)])


def test_part_of_a_batch_has_the_tokens_and_masks_of_the_whole(easy, model) -> None:
    """As RebatchLatents and LatentFromBatch make it."""
    batch, _ = easy.batched_tokens(3)
    applied = easy.apply(model, tokens=batch, mask=masks_of(3))
    whole = sampled_as_ksampler(applied, [0, 1, 2, 3])
    for numbers in ([0], [1], [2], [1, 2], [3, 0]):
        part = sampled_as_ksampler(applied, numbers)
        assert golden.error(part, whole[numbers]) <= 1e-5
    last = easy.apply(model, tokens=row(batch, 2), mask=masks_of(3)[-1:])
    beyond = (sampled_as_ksampler(each, [100]) for each in (applied, last))  # the last row repeats
    assert golden.error(*beyond) <= 1e-5


def row(pair: Any, i: int) -> Any:
    """The tokens of one latent; the last row repeats."""
    sides = pair.conditional, pair.unconditional
    rows = (Tensor(side)[min(i, len(side) - 1)][None].clone() for side in sides)
    return type(pair)(*(type(side).of(row, side.provenance) for side, row in zip(sides, rows, strict=True)))


@pytest.mark.parametrize("numbers", [[0, 0], [0, 1, 0]])
def test_latents_of_one_noise_are_identified_by_position(easy, model, log, numbers: list[int]) -> None:
    """As Latent Batch and Latent Batch Seed Behavior make them: batch_index repeats, for the noise only."""
    batch, singles = easy.batched_tokens(len(numbers))
    together = sampled_as_ksampler(easy.apply(model, tokens=batch), numbers)
    for i, tokens in enumerate(singles):
        alone = sampled_as_ksampler(easy.apply(model, tokens=tokens), numbers)
        assert golden.error(together[i], alone[i]) <= 1e-5
    assert not log.text


def test_part_that_the_noise_does_not_identify_is_warned_of(easy, model, log) -> None:
    batch, _ = easy.batched_tokens(3)
    applied = easy.apply(model, tokens=batch)
    sample_cfg(applied, batch=2)  # the noise is of another seed
    assert log.text.count("take the first rows") == 1
    sample_cfg(applied, batch=3)
    sample_cfg(easy.apply(model), batch=2)
    assert log.text.count("take the first rows") == 1


def test_reading_the_noise_leaves_the_random_numbers_as_they_are(pack) -> None:
    frames = golden.part(pack, "nodes.unet_patch.sub_batch").frames_by_noise
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 3, [7])
    whole = comfy.sample.prepare_noise(torch.zeros(2, 4, 8, 8), 3)
    before = torch.get_rng_state()
    assert frames(noise, 3, 64) == (7,)
    assert frames(noise, 3, 7) is None
    assert frames(noise, 4, 64) is None
    for no_seed in (None, "seed", 2**70):
        assert frames(noise, no_seed, 64) is None
    assert frames(whole, 3, 64) == (0, 1)
    assert torch.equal(torch.get_rng_state(), before)


def combined(easy: Easy, node: str, *pairs: Any, **inputs: Any) -> Any:
    """Output of a node that combines several token pairs."""
    tokens = {f"tokens{i}": pair for i, pair in enumerate(pairs)}
    return golden.execute(easy.pack, node, tokens=tokens, **inputs).result[0]


@pytest.mark.one_host
@pytest.mark.parametrize("negatives", ["the same", "their own"])
@pytest.mark.parametrize("kind", ["batch", "frames", "joined batch"])
def test_each_latent_has_its_own_tokens(easy, model, kind: str, negatives: str) -> None:
    other = easy.other_tokens()
    if negatives == "the same":
        other = type(other)(other.conditional, easy.tokens.unconditional)
    if kind == "frames":
        node = "EasyRefTokensOverFrames"
        pair = combined(easy, node, easy.tokens, other, frames=3, easing="ease in")
    else:
        pair = combined(easy, "EasyRefBatchTokens", easy.tokens, other)
    if kind == "joined batch":
        pair = combined(easy, "EasyRefCombineTokens", pair, easy.tokens, **JOIN)
    prompts, latents = (random_conditioning(0, 77), random_conditioning(1, 77)), len(pair.conditional)

    def sampled(tokens: Any) -> torch.Tensor:
        return sample_cfg(easy.apply(model, tokens=tokens), conds=prompts, batch=latents)

    together, alone = sampled(pair), [sampled(row(pair, i)) for i in range(latents)]
    for i in range(latents):
        assert golden.error(together[i], alone[i][i]) <= 1e-5
    assert golden.error(together[-1], alone[0][-1]) > 0.1
