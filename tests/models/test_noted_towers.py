"""Notes of single patches in towers that see several images in one sequence, or fold patches into tokens. The oracles
are transformers' own eager attention and loops over patches."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.packed import seen
from vtprune.models.engine.packing import Packing, in_corner, in_order, in_squares
from vtprune.models.parts.tiny import tiny_prompts

import vtprune
from vtprune.core.select import from_mask
from vtprune.core.types import Action, Cut
from vtprune.methods._tower import class_attention, projections
from vtprune.methods.base import METHODS, Method, MethodInfo, register

SEEN: dict[str, list] = {}
FAMILIES = ("smolvlm", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "glm4v", "mistral3")
PAIRS = [(f, v) for f in FAMILIES for v in ADAPTERS.get(f).tiny if v != "whole"]  # rasters of several sizes
VALUES = 4  # that the spy notes of each patch


@pytest.fixture(autouse=True)
def spy():
    SEEN.clear()

    @register(
        MethodInfo(
            name="spy-patches",
            paper="baseline",
            idea="notes what every block of the tower shows of its patches, and looks at it behind the projector",
            kinds=("projector", "llm", "vision"),
            needs={"vision": frozenset({"projections"})},
            cases=({"keep": 1.0}, {"keep": 0.5}),
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class Notes(Method):
        site: str = "projector"
        plain: bool = False

        def plan(self, geometry, keep):
            marks = [Cut(site=f"vision.{i}", action=Action.NOTE) for i in range(geometry.seen_layers)]
            return (*marks, Cut(site=self.site, keep=keep, data={"sites": [c.site for c in marks]}))

        def note(self, view, cut):
            t = view.source("projections") if self.plain else projections(view)
            assert view.prefix == 0 and t.bias is None and view.source("prefix").shape[1] == 0
            logits = t.q.double() @ t.k.double().transpose(2, 3) * t.scale  # [g, H, n, n]
            windows = view.source("windows") if "windows" in view.sources else None
            if windows is not None:
                apart = torch.ones(len(logits), *logits.shape[2:], dtype=torch.bool)
                for g, image in enumerate(windows.tolist()):
                    for window in ([i for i in window if i >= 0] for window in image):
                        for i in window:
                            apart[g, i, window] = False
                logits = logits.masked_fill(apart[:, None], -torch.inf)
            SEEN.setdefault(cut.site, []).append((view, logits.softmax(-1), windows is not None))
            earlier = view.noted(f"vision.{int(cut.site[7:]) - 1}")[..., 1] if cut.site != "vision.0" else view.index
            values = [view.index, view.features[..., 0], class_attention(view), earlier]
            return torch.stack([v.double() for v in values], -1)

        def select(self, view, cut):
            noted = torch.stack([view.noted(s) for s in cut.data["sites"]], 2)  # [B, N, blocks, VALUES]
            SEEN.setdefault("behind", []).extend(noted[g][view.valid[g]] for g in range(len(view.valid)))
            return from_mask(view.valid)

    yield
    METHODS._forget("spy-patches")


@dataclass
class Raster:
    """One image, tile or step in time: the row of the sequence of every patch ``(row, column)`` that is seen, and rows
    and columns of the tokens that it becomes."""

    place: dict[tuple[int, int], int]
    tokens: tuple[int, int]

    @property
    def order(self) -> list[int]:
        return [self.place[patch] for patch in sorted(self.place)]


@dataclass
class Record:
    """One call of the tower: its rasters, per block the attention ``[H, S, S]`` and the states ``[S, C]``."""

    rasters: list[Raster] = field(default_factory=list)
    positions: Tensor | None = None
    parts: list[list[Tensor]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def attention(self, block: int) -> Tensor:
        """The parts that attend within themselves, along the diagonal."""
        rows = [w for part in self.parts[block] for w in part]
        whole, at = torch.zeros(len(rows[0]), *[sum(w.shape[-1] for w in rows)] * 2, dtype=torch.float64), 0
        for w in rows:
            whole[:, at : at + w.shape[-1], at : at + w.shape[-1]] = w
            at += w.shape[-1]
        return whole


def fold_of(model: Any) -> int:
    config = model.config
    own = getattr(config, "scale_factor", None) or getattr(config, "spatial_merge_size", None)
    return own or getattr(config.vision_config, "spatial_merge_size", 1)


def rasters_of(model: Any, inputs: dict[str, Any], positions: Tensor | None) -> list[Raster]:
    """Where patches stand, by the positions that the model itself rotates them by."""
    fold, out, at = fold_of(model), [], 0
    if "patch_attention_mask" in inputs:
        for tile in inputs["patch_attention_mask"].tolist():
            rows, columns = len(tile), len(tile[0])
            place = {(r, c): at + r * columns + c for r in range(rows) for c in range(columns) if tile[r][c]}
            out.append(Raster(place, (rows // fold, columns // fold)))
            at += rows * columns
        return out
    assert positions is not None
    if "image_sizes" in inputs:
        side = model.config.vision_config.patch_size
        sizes = [(int(h) // side, int(w) // side) for h, w in inputs["image_sizes"]]
    else:
        sizes = [(h, w) for t, h, w in inputs["grid_thw"].tolist() for _ in range(t)]
        if hasattr(model.config.vision_config, "window_size"):
            from transformers.vision_utils import get_vision_window_index

            v = model.config.vision_config
            index, _ = get_vision_window_index(inputs["grid_thw"], fold, v.window_size, v.patch_size)
            positions = positions.view(-1, fold * fold, 2)[index].view(-1, 2)
    for h, w in sizes:
        place = {tuple(positions[at + i].tolist()): at + i for i in range(h * w)}
        assert len(place) == h * w
        out.append(Raster(place, (h // fold, w // fold)))
        at += h * w
    return out


def watched(model: Any, tower: Any, blocks: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """Every call of the tower from now on."""
    records: list[Record] = []
    attention = next(m for m in blocks[0].children() if "Attention" in type(m).__name__)
    module = sys.modules[type(attention).__module__]
    original = module.eager_attention_forward

    def eager(*args, **kwargs):
        output, weights = original(*args, **kwargs)
        if records and len(records[-1].states) < len(blocks):
            records[-1].parts[-1].append(weights.double())
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", eager)
    model.set_attn_implementation({"vision_config": "eager"})
    given: dict[str, Any] = {}

    def begin(m, args, kwargs):
        given.clear()
        given.update(kwargs)
        records.append(Record())

    def placed(m, args):
        records[-1].positions = args[1]

    def enter(m, args):
        records[-1].parts.append([])

    def leave(m, args, output):
        x = output[0] if isinstance(output, tuple) else output
        records[-1].states.append(x.reshape(-1, x.shape[-1]).double())

    def end(m, args, output):
        records[-1].rasters = rasters_of(model, given, records[-1].positions)

    tower.register_forward_pre_hook(begin, with_kwargs=True)
    rotary = next((m for m in tower.children() if "Rotary" in type(m).__name__), None)
    if rotary is not None:
        rotary.register_forward_pre_hook(placed)
    for block in blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    tower.register_forward_hook(end)
    return records


def noted_by_loops(record: Record, raster: Raster, blocks: int, fold: int) -> Tensor:
    """``[tokens, blocks, VALUES]``: patch by patch, then the mean over the patches of each token that are seen."""
    columns = 1 + max((c for _, c in raster.place), default=0)
    noted: dict[tuple[int, int], list[list[float]]] = {}
    attention = [record.attention(i) for i in range(blocks)]
    for (r, c), s in raster.place.items():
        noted[r, c] = []
        for i in range(blocks):
            received = sum(float(attention[i][:, t, s].mean()) for t in raster.place.values()) / len(raster.place)
            index = float(r * columns + c)
            earlier = float(record.states[i - 1][s, 0]) if i else index
            noted[r, c].append([index, float(record.states[i][s, 0]), received, earlier])
    out = []
    for i in range(raster.tokens[0]):
        for j in range(raster.tokens[1]):
            patches = [(fold * i + a, fold * j + b) for a in range(fold) for b in range(fold)]
            mine = [noted[p] for p in patches if p in noted]
            missing = torch.full((blocks, VALUES), torch.nan, dtype=torch.float64)
            out.append(torch.tensor(mine, dtype=torch.float64).mean(0) if mine else missing)
    return torch.stack(out)


def prepared(family: str, variant: str, tiny) -> tuple[Any, dict[str, Any]]:
    """The tiny model in double precision; images of sizes that windows do not divide, where they may have any."""
    model, inputs = tiny(family, variant)
    model.set_experts_implementation("eager")  # the usual one has no double precision
    if "image_grid_thw" in inputs and "video_grid_thw" not in inputs:
        thw = [[1, 6, 10], [1, 4, 8], [1, 10, 6]]
        inputs |= tiny_prompts([[(3, 15), (3, 8)], [(3, 15)]], opening=5)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 3).int()
        inputs["image_grid_thw"] = torch.tensor(thw)
        patches = sum(t * h * w for t, h, w in thw)
        inputs["pixel_values"] = torch.randn(patches, 96, generator=torch.Generator().manual_seed(4))
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family, variant", PAIRS)
def test_notes_of_patches_are_the_tower_s_own(family, variant, tiny, monkeypatch):
    """States, attention within each raster (and window), and what arrives at each placeholder."""
    model, inputs = prepared(family, variant, tiny)
    with vtprune.attach(model, "spy-patches", keep=1.0, per="sample") as handle, torch.no_grad():
        described = handle.adapter.engines[0].tower
        blocks = list(described.blocks)
        assert len(blocks) == handle.adapter.geometry.seen_layers
        records = watched(model, described.root, blocks, monkeypatch)
        model(**inputs)
    assert len(records) == sum(name.startswith("pixel_values") for name in inputs)
    rasters = [(record, raster) for record in records for raster in record.rasters]
    assert len({(r.tokens, len(r.place)) for _, r in rasters}) > 1
    for i in range(len(blocks)):
        views = [(v, g, a[g], w) for v, a, w in SEEN[f"vision.{i}"] for g in range(len(a))]
        assert len(views) == len(rasters)
        for record, raster in rasters:
            states, inside = record.states[i][raster.order], record.attention(i)[:, raster.order][:, :, raster.order]
            mine = [w for w in views if w[0].features.shape[1] == len(states) and close(w[0].features[w[1]], states)]
            assert len(mine) == 1
            view, g, attention, windowed = mine[0]
            torch.testing.assert_close(attention, inside, rtol=1e-4, atol=1e-6)
            assert view.grid == tuple(1 + max(n) for n in zip(*raster.place, strict=True))
            assert view.index[g].tolist() == list(range(len(states))) and bool(view.valid.all())
            assert windowed == (i not in getattr(model.config.vision_config, "fullatt_block_indexes", [i]))
    want = told(model, inputs, records, len(blocks))
    assert len(SEEN["behind"]) == len(want)
    for sample in want:
        assert sum(got.shape == sample.shape and close(got, sample) for got in SEEN["behind"]) == 1


def told(model: Any, inputs: dict[str, Any], records: list[Record], blocks: int) -> list[Tensor]:
    """Per sample ``[visual tokens, blocks, VALUES]``, placeholder after placeholder: images and videos by turns."""
    fold = fold_of(model)
    made = [[v for r in record.rasters for v in noted_by_loops(record, r, blocks, fold)] for record in records]
    moving = getattr(model.config, "video_token_id", None) if len(records) > 1 else None
    visual = {getattr(model.config, n, None) for n in ("image_token_id", "image_token_index", "video_token_id")}
    out, at = [], [0] * len(records)
    for row in inputs["input_ids"].tolist():
        sample = []
        for token in row:
            if token in visual - {None}:
                which = int(token == moving)
                sample.append(made[which][at[which]])
                at[which] += 1
        out.append(torch.stack(sample))
    assert at == [len(m) for m in made]
    return out


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.double(), want, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("family, variant", [(f, list(ADAPTERS.get(f).tiny)[-1]) for f in FAMILIES])
def test_notes_are_found_again_however_the_images_are_encoded(family, variant, tiny):
    """``generate``, which encodes them before the forward, beams, and a cut inside the language model."""
    model, inputs = prepared(family, variant, tiny)
    with vtprune.attach(model, "spy-patches", keep=1.0, per="sample"), torch.no_grad():
        model(**inputs)
        want = SEEN.pop("behind")
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        again = SEEN.pop("behind")
    # transformers itself cannot search with GLM's videos, and up to 5.17 repeats Mistral's sizes image by image
    beams = 1 if family in ("glm4v", "mistral3") else 2
    with vtprune.attach(model, "spy-patches", keep=1.0, per="sample", site="llm.2"), torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, num_beams=beams, do_sample=False)
        inside = SEEN.pop("behind")
    for found in (again, inside[::2] if len(inside) == 2 * len(want) else inside):
        assert len(found) == len(want)
        for sample in want:
            assert any(got.shape == sample.shape and close(got, sample) for got in found)


def test_windows_have_to_be_asked_for(tiny):
    """A method that does not know of them would compare patches that never met."""
    model, inputs = tiny("qwen2.5-vl", "images")
    with vtprune.attach(model, "spy-patches", keep=1.0, plain=True), torch.no_grad():
        with pytest.raises(vtprune.UnsupportedError, match="within windows"):
            model(**inputs)


def test_only_known_blocks_are_noted(tiny):
    model, _ = tiny("qwen3-vl", "images")
    model.model.visual.blocks[1] = torch.nn.Identity()
    with pytest.raises(vtprune.UnsupportedError, match="Identity is no block"):
        vtprune.attach(model, "spy-patches", keep=1.0)


@pytest.mark.parametrize("family", ["qwen2-vl", "mistral3"])
def test_other_attention_than_within_rasters_is_refused(family, tiny):
    model, inputs = tiny(family, next(iter(ADAPTERS.get(family).tiny)))

    def changed(module, args, kwargs):
        if "cu_seqlens" in kwargs:  # all images see each other
            return args, {**kwargs, "cu_seqlens": kwargs["cu_seqlens"][[0, -1]]}
        return (args[0], torch.zeros_like(args[1])), kwargs

    with vtprune.attach(model, "spy-patches", keep=1.0) as handle, torch.no_grad():
        block = handle.adapter.engines[0].tower.blocks[0]
        hook = block.register_forward_pre_hook(changed, with_kwargs=True, prepend=True)
        with pytest.raises(vtprune.UnsupportedError, match="something else than the patches of one image"):
            model(**inputs)
        hook.remove()
        assert torch.isfinite(model(**inputs).logits).all()  # nothing is left behind


def test_a_block_by_itself_and_one_left_out_are_refused(tiny):
    model, inputs = tiny("qwen2-vl", "images")
    with vtprune.attach(model, "spy-patches", keep=1.0), torch.no_grad():
        blocks = model.model.visual.blocks
        with pytest.raises(vtprune.UnsupportedError, match="called by itself"):
            blocks[0](torch.zeros(4, 32), torch.tensor([0, 4]), (torch.ones(4, 16), torch.zeros(4, 16)))
        last = blocks[2]
        del blocks[2]
        with pytest.raises(vtprune.UnsupportedError, match="2 of the 3 blocks ran"):
            model(**inputs)
        blocks.append(last)


def test_a_tile_must_be_shown_from_its_corner(tiny):
    model, inputs = tiny("smolvlm", "smolvlm")
    inputs["pixel_attention_mask"][0, 0, 8:12, 8:12] = 0
    with vtprune.attach(model, "spy-patches", keep=1.0), torch.no_grad():
        with pytest.raises(vtprune.UnsupportedError, match="upper left corner"):
            model(**inputs)


def test_the_last_block_that_counts_is_the_one_whose_output_is_used(tiny):
    model, inputs = tiny("mistral3", "pixtral")
    model.config.vision_feature_layer = -2
    with vtprune.attach(model, "spy-patches", keep=1.0) as handle, torch.no_grad():
        model(**inputs)
        assert handle.adapter.geometry.seen_layers == 2 and "vision.2" not in SEEN
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(vtprune.UnsupportedError, match="does not show"):
        vtprune.attach(model, "visionzip", keep=0.5)


def test_patches_that_form_no_whole_token_are_left_out(tiny):
    """9 x 7 patches of Mistral 3 are 4 x 3 tokens."""
    model, inputs = tiny("mistral3", "sliding")
    inputs |= {**tiny_prompts([[(3, 3)] * 4, [(3, 4)]]), "image_sizes": torch.tensor([[36, 28], [8, 32]])}
    inputs["pixel_values"] = torch.randn(2, 3, 36, 32, generator=torch.Generator().manual_seed(5))
    with vtprune.attach(model, "spy-patches", keep=1.0, per="sample"), torch.no_grad():
        model(**inputs)
    first = SEEN["behind"][0][:, 0, 0].view(4, 3)
    assert first.tolist() == [[2 * i * 7 + 2 * j + 4 for j in range(3)] for i in range(4)]


def test_masks_are_read_in_every_form():
    device = torch.device("cpu")
    one = Packing([in_order(2, 3, 1), in_order(1, 2, 1)], device)
    own = torch.tensor([0] * 6 + [1] * 2)
    same = (own[:, None] == own)[None, None]
    assert seen(one, same) and seen(one, torch.zeros(1, 1, 8, 8).masked_fill(~same, -1e30))
    assert not seen(one, None) and not seen(one, torch.ones_like(same)) and not seen(one, same.tril())
    tiles = Packing([in_corner(2, 2, (2, 2), 2), in_corner(1, 2, (2, 2), 2)], device, batched=True)
    shown = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    additive = torch.zeros(2, 1, 4, 4).masked_fill(shown[:, None, None] == 0, -torch.inf)
    assert seen(tiles, shown) and seen(tiles, shown[:, None, None].bool()) and seen(tiles, additive)
    assert not seen(tiles, None) and not seen(tiles, additive.mT) and not seen(tiles, torch.ones_like(shown))
    assert seen(Packing([in_corner(2, 2, (2, 2), 2)], device, batched=True), None)


def test_windows_at_the_border_are_smaller():
    raster = in_squares(6, 10, 2, 2)  # 3 x 5 tokens in windows of 2 x 2
    assert (raster.windows >= 0).sum(1).tolist() == [16, 16, 8, 8, 8, 4]
    assert raster.windows[2].tolist()[:8] == [8, 9, 18, 19, 28, 29, 38, 39]
    assert raster.windows[0].tolist()[:4] == [0, 1, 10, 11]  # the first token's patches
    assert sorted(raster.place.tolist()) == list(range(60))
