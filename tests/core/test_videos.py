"""What holds of every method of videos: what its budget applies to, what a frame is, what stays whole."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.layout import units
from vtprune.models.parts.tiny import tiny_prompts

import vtprune
from vtprune.core import select as select_module
from vtprune.core import types as types_module
from vtprune.core.planning import applies_to, bind
from vtprune.core.recipe import Recipe, Stage
from vtprune.core.types import Action, Geometry, TokenView
from vtprune.methods.base import METHODS, make

VIDEO = [name for name, info in METHODS.items() if info.video]
BEHIND = [name for name in VIDEO if METHODS.get(name).kinds[0] == "projector"]  # their first decision is there
TOWERS = ("hf-vit", "timm-vit", "open-clip")
stays_whole = pytest.mark.filterwarnings("ignore:.*stay whole")


def test_which_they_are():
    assert {"evs", "vidcom2", "dycoke", "fastvid", "holitom", "framefusion", "prunevid"} < set(VIDEO)
    assert {"uniform-frames", "key-frames"} < set(BEHIND) and "framefusion" not in BEHIND


def recipe(*stages: Stage) -> Recipe:
    return Recipe(name="test", stages=stages)


def clips(family: str, samples: list[list[tuple[int, ...]]]) -> dict[str, Any]:
    """Prompts for Qwen-VL: ``(frames, rows, columns)`` of a video in visual tokens, ``(rows, columns)`` of an image."""
    stamped, opening = family.startswith("qwen3"), 5  # a time stamp stands between frames
    spans: list[list[tuple[int, int]]] = []
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for sample in samples:
        row: list[tuple[int, int]] = []
        for *frames, h, w in sample:
            t = frames[0] if frames else 1
            row += [(4, h * w)] * t if frames and stamped else [(4 if frames else 3, t * h * w)]
            grids["video" if frames else "image"].append([t, 2 * h, 2 * w])
        spans.append(row)
    inputs: dict[str, Any] = tiny_prompts(spans, opening=opening)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 3).int() + 2 * (inputs["input_ids"] == 4).int()
    generator = torch.Generator().manual_seed(3)
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
            rows = sum(t * h * w for t, h, w in grids[kind])
            inputs[name] = torch.randn(rows, 3 * 2 * 16, generator=generator)
    return inputs


def stages(model: Any, inputs: dict[str, Any], method: Any, **options: Any) -> Any:
    """The report's stages of one prefill."""
    with vtprune.attach(model, method, **options) as handle, torch.no_grad():
        model(**inputs)
        return handle.report().stages


def first(model: Any, inputs: dict[str, Any], method: str, **options: Any) -> Any:
    return stages(model, inputs, method, **options)[0]


# --------------------------------------------------------------------------------------------------------------------
# what a budget applies to


@pytest.mark.parametrize("family", [name for name in ADAPTERS if name not in (*TOWERS, "causal-lm")])
def test_a_budget_is_for_all_frames(family, tiny):
    model, _ = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    geometry = bind(model).geometry
    takes = "video" if "video" in geometry.per else "sample"
    for name in VIDEO:
        method = recipe(Stage(method=name))
        assert applies_to(geometry, method, None) == takes
        assert applies_to(geometry, method, "sample") == "sample"
        for per in ("image", "tile"):
            with pytest.raises(vtprune.UnsupportedError, match=f"{name} compares the frames .* not '{per}'") as error:
                applies_to(geometry, method, per)
            assert "\n" not in str(error.value)
    other = recipe(Stage(method="random", keep=4))
    assert applies_to(geometry, other, None) == geometry.per[0] and applies_to(geometry, other, "sample") == "sample"


def test_a_model_of_text_has_no_frames(tiny):
    geometry = bind(tiny("causal-lm", "llama")[0]).geometry
    for name in VIDEO:
        for per in (None, "sample"):
            with pytest.raises(vtprune.UnsupportedError, match=f"{name} compares the frames .* reads text alone"):
                applies_to(geometry, recipe(Stage(method=name)), per)


def test_one_stage_of_videos_decides_for_the_recipe():
    model, _ = ADAPTERS.get("qwen2.5-vl").tiny["video"]()
    both = recipe(Stage(method="evs", keep=0.5), Stage(method="fastv", keep=0.25))
    assert applies_to(bind(model).geometry, both, None) == "video"
    with pytest.raises(vtprune.UnsupportedError, match="evs compares the frames"):
        vtprune.attach(model, both, per="image")
    vtprune.attach(model, both, per="sample").remove()


@pytest.mark.parametrize(("family", "variant"), [("hf-vit", "clip"), ("timm-vit", "class"), ("open-clip", "clip")])
def test_a_tower_alone_sees_no_video(family, variant, tiny):
    model, _ = tiny(family, variant)
    for name in VIDEO:
        with pytest.raises(vtprune.UnsupportedError, match="sees one image at a time") as error:
            vtprune.attach(model, name)
        assert str(error.value).startswith(f"{name} compares the frames of a video") and "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen3-vl"])
def test_two_videos_of_a_prompt(family, tiny):
    """A budget for each, or one for the frames of both."""
    model, _ = tiny(family, "video")
    inputs = clips(family, [[(3, 2, 2), (5, 2, 2)], [(4, 2, 2)]])
    for name in BEHIND:
        method = METHODS.get(name)
        each, both = (first(model, inputs, name, keep=12, per=per) for per in ("video", "sample"))
        if method.exact:
            assert each.tokens_out == [24, 12] and both.tokens_out == [12, 12], name
        assert each.kept[1].tolist() == both.kept[1].tolist()
        assert any(i < 12 for i in each.kept[0].tolist()) and any(i >= 12 for i in each.kept[0].tolist())
    assert first(model, inputs, "uniform-frames", keep=8, per="video").kept[0].tolist() == [
        t * 4 + i for t in (0, 2, 4, 6) for i in range(4)
    ]
    assert first(model, inputs, "uniform-frames", keep=8, per="sample").kept[0].tolist() == [
        t * 4 + i for t in (2, 6) for i in range(4)
    ]
    # one after another is what each alone gives
    alone = [first(model, clips(family, [[video]]), "uniform-frames", keep=8) for video in ((3, 2, 2), (5, 2, 2))]
    assert [a.tokens_out for a in alone] == [[8], [8]]


def test_the_frames_of_a_unit(tiny):
    """Of a video and of several images; an image alone has none."""
    model, _ = tiny("qwen3-vl", "video")
    inputs = clips("qwen3-vl", [[(3, 2, 2), (2, 4)], [(2, 2), (2, 2)], [(2, 2)]])
    samples = bind(model).parts(inputs["input_ids"], inputs)
    assert [u.frames for u in units(samples, "video")] == [(4, 4, 4), (), (), (), ()]
    assert [u.frames for u in units(samples, "sample")] == [(4, 4, 4, 8), (4, 4), ()]
    assert all(u.frames == () for per in ("image", "tile") for u in units(samples, per))


# --------------------------------------------------------------------------------------------------------------------
# what stays whole, what is refused


@pytest.mark.parametrize("name", VIDEO)
def test_images_of_their_own_stay_whole(name, tiny):
    """With one warning per attachment, whatever the number of prompts and of cuts."""
    model, inputs = tiny("qwen3-vl", "video")
    counts = (inputs["input_ids"] == 3).sum(1).tolist()  # of the images; the video's 16 tokens come first
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            with vtprune.attach(model, name, keep=8) as handle:
                for _ in range(3):
                    model(**inputs)
                (*_, last) = handle.report().stages
        told = [str(w.message) for w in caught if "stay whole" in str(w.message)]
        assert len(told) == 1
        assert all(t.startswith(f"{name} prunes videos: images of their own") for t in told)
        assert last.kept[0].tolist()[-counts[0] :] == list(range(16, 16 + counts[0]))
        assert last.kept[1].tolist() == list(range(counts[1]))
        assert last.tokens_out[0] < 16 + counts[0]


@pytest.mark.parametrize("name", VIDEO)
def test_videos_alone_are_no_reason_to_warn(name, tiny):
    model, _ = tiny("qwen2.5-vl", "video")
    inputs = clips("qwen2.5-vl", [[(6, 2, 3)], [(4, 2, 2)]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (*_, last) = stages(model, inputs, name, keep=8)
    if METHODS.get(name).exact:
        assert last.tokens_out == [8, 8]


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.filterwarnings("ignore:.*stay whole")
def test_frames_of_several_sizes_are_refused(name, tiny):
    model, _ = tiny("qwen3-vl", "video")
    inputs = clips("qwen3-vl", [[(3, 2, 2), (3, 2, 4)], [(2, 2, 2)]])
    stages(model, inputs, name, keep=8)  # each video is of one size
    with pytest.raises(vtprune.UnsupportedError, match=r"differ in size: 4, 8 tokens") as error:
        stages(model, inputs, name, keep=8, per="sample")
    assert str(error.value).startswith(f"{name} compares the frames of a video") and "\n" not in str(error.value)


def test_images_of_several_sizes_are_no_frames(tiny):
    model, inputs = tiny("internvl", "qwen2")  # an image of two tiles beside one of one
    with pytest.raises(vtprune.UnsupportedError, match=r"differ in size: 16, 32 tokens"):
        first(model, inputs, "evs", keep=8)


@pytest.mark.parametrize("name", VIDEO)
def test_a_tower_that_drops_in_front_is_refused(name):
    model, _ = ADAPTERS.get("llava").tiny["clip-llama"]()
    both = recipe(Stage(method="flowcut", keep=0.5), Stage(method=name, keep=0.25))
    if METHODS.get(name).whole:
        with pytest.raises(vtprune.VtpruneError, match=f"{name} needs the whole raster; it cannot follow flowcut"):
            vtprune.attach(model, both)
    else:
        vtprune.attach(model, both).remove()
    vtprune.attach(model, recipe(Stage(method=name, keep=0.5))).remove()


# --------------------------------------------------------------------------------------------------------------------
# what a frame is


@stays_whole
@pytest.mark.parametrize("variant", ["smolvlm", "idefics3"])
def test_tiles_of_smolvlm_are_one_image(variant, tiny):
    """Three rasters behind the same token are frames; behind tokens of their own the tiles of one image."""
    model, inputs = tiny("smolvlm", variant)
    assert first(model, inputs, "uniform-frames", keep=16).kept[0].tolist() == list(range(16, 32))
    assert first(model, inputs, "evs", keep=20).tokens_out == [20, 16]
    ids = inputs["input_ids"].clone()
    starts = [i for i in range(1, ids.shape[1]) if ids[0, i] == 3 != ids[0, i - 1]]
    assert len(starts) == 3 and {int(ids[0, i - 1]) for i in starts} == {7}
    ids[0, starts[0] - 1], ids[0, starts[1] - 1] = 8, 9  # <row_1_col_1>, <row_1_col_2>, the small version
    tiled = {**inputs, "input_ids": ids}
    assert [[p.image for p in sample] for sample in bind(model).parts(ids, tiled)] == [[0, 0, 0], [0]]
    with pytest.warns(UserWarning, match="stay whole"):
        assert first(model, tiled, "evs", keep=20).tokens_out == [48, 16]
    ids[0, starts[1] - 1] = 7  # an image of two rasters, and one of one
    assert [[p.image for p in sample] for sample in bind(model).parts(ids, tiled)] == [[0, 0, 1], [0]]
    with pytest.raises(vtprune.UnsupportedError, match=r"differ in size: 16, 32 tokens"):
        first(model, tiled, "evs", keep=20)
    # other methods go on deciding raster by raster
    assert first(model, tiled, "random", keep=5).tokens_out == [15, 5]


@stays_whole
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_equal_images_of_a_prompt_are_frames(family, tiny):
    model, inputs = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    (image,) = inputs["input_ids"][inputs["input_ids"] == bind(model).image_token].unique().tolist()
    n, pixels = bind(model).geometry.tokens, inputs["pixel_values"][:1]
    prompts = tiny_prompts([[(image, n)] * 4, [(image, n)]])
    noise = torch.randn(5, *pixels.shape[1:], generator=torch.Generator().manual_seed(3))
    inputs = {**prompts, "pixel_values": noise}
    for name in BEHIND:
        got = first(model, inputs, name, keep=24)
        assert got.tokens_out[1] == n and 0 < got.tokens_out[0] < 4 * n, name
        if METHODS.get(name).exact:
            assert got.tokens_out[0] == 24, name
    chosen = first(model, inputs, "uniform-frames", keep=2 * n).kept[0]
    assert chosen.tolist() == [*range(n, 2 * n), *range(3 * n, 4 * n)]


@stays_whole
@pytest.mark.parametrize("name", BEHIND)
def test_a_new_line_token_stays(name, tiny):
    """LLaVA-OneVision: three frames of four tokens and one behind them."""
    model, inputs = tiny("llava-onevision", "video")
    images = int((inputs["input_ids"] == 3).sum())
    for keep in (3, 6, 9, 13):
        stage = next(s for s in stages(model, inputs, name, keep=keep) if s.site == "projector")
        assert stage.kept[0].tolist()[-1] == 12 and len(stage.kept[0]) <= 13
        assert stage.kept[1].tolist() == list(range(images))


# --------------------------------------------------------------------------------------------------------------------
# the solver


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("family", "n"), [("qwen2.5-vl", 48), ("qwen3-vl", 48), ("llava-onevision", 13)])
@pytest.mark.parametrize("name", ["evs", "vidcom2", "dycoke", "uniform-frames", "key-frames", "prunevid"])
def test_the_solver_meets_a_video_s_budget(family, n, name, tiny):
    model, inputs = tiny(family, "video")
    if family == "llava-onevision":
        real = inputs["attention_mask"][0].bool()
        inputs = {k: v[:1, real] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
        inputs = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_sizes")}
    else:
        inputs = clips(family, [[(8, 2, 3)]])
    for target in (0.4 * n, 0.75, 0.9):
        made = vtprune.solve(model, name, effective_tokens=target, inputs=inputs)
        with vtprune.attach(model, made) as handle, torch.no_grad():
            model(**inputs)
            report = handle.report()
        got, wanted = report.effective_tokens, target * n if target < 1 else target
        got = got[0] if isinstance(got, list) else got
        assert 0 < got <= wanted + 1e-6
        if name in ("evs", "vidcom2"):
            assert got == int(wanted + 1e-9)


def test_the_solver_names_the_smallest(tiny):
    """EVS never leaves less than a frame, DyCoke than every fourth."""
    model, _ = tiny("qwen2.5-vl", "video")
    inputs = clips("qwen2.5-vl", [[(8, 2, 3)]])
    for name, least in (("evs", 6), ("dycoke", 12), ("uniform-frames", 6), ("vidcom2", 1)):
        made = vtprune.solve(model, name, effective_tokens=least, inputs=inputs)
        assert first(model, inputs, made).tokens_out == [least]
        if least > 1:
            with pytest.raises(vtprune.VtpruneError, match=f"smallest schedule has {least}"):
                vtprune.solve(model, name, effective_tokens=least - 1, inputs=inputs)


# --------------------------------------------------------------------------------------------------------------------
# what it costs


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def geometry(f: int, p: int, loose: int = 0) -> Geometry:
    return Geometry(
        family="x",
        arch="x",
        tokens=f * p + loose,
        grid=(1, p),
        prefix=0,
        vision_layers=2,
        vision_depth=2,
        llm_layers=6,
        provides={"vision": frozenset({"projections"}), "projector": frozenset(), "llm": frozenset()},
        notes=frozenset({"projections"}),
        seen_layers=2,
        rasters=((1, p),) * f + ((1, 1),) * loose,
        frames=f,
        variable=True,
    )


def view(x: Tensor, f: int, p: int) -> TokenView:
    b, n, _ = x.shape
    valid, note = torch.ones(b, n, dtype=torch.bool), torch.rand(b, n, generator=torch.Generator().manual_seed(1))
    return TokenView(
        features=x,
        valid=valid,
        index=torch.arange(n).expand(b, n),
        size=torch.ones(b, n),
        protected=torch.zeros(b, n, dtype=torch.bool),
        grid=(1, p),
        rasters=(((1, p),) * f,) * b,
        frames=((p,) * f,) * b,
        sources={"note vision.1": lambda: note, "query_attention": lambda **_: note},
        known=(valid, n, n),
    )


SCALED = [name for name in VIDEO if name != "key-frames"]  # which chooses one frame after another


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in SCALED), ("vidcom2", {"rounding": "frames"}), ("dycoke", {"ratio": 0.3})],
)
def test_operators_do_not_grow_with_the_frames(name, options, monkeypatch):
    """No loop over frames, and no question to the device for each."""
    asked: list[int] = []
    for module in (select_module, types_module):
        real = types_module.extent
        monkeypatch.setattr(module, "extent", lambda mask, real=real: asked.append(1) or real(mask))
    seen, questions = [], []
    for f in (32 if name == "prunevid" else 8, 256):  # torch.cdist has a way of its own for 25 rows or less
        x = torch.randn(1, f * 4, 6, generator=torch.Generator().manual_seed(0)) + 1
        method = make(name, options)
        deciding = [c for c in method.plan(geometry(f, 4), f) if c.action is Action.SELECT and c.site != "llm.2"]
        asked.clear()
        with Operators() as operators:
            chosen = method.select(view(x, f, 4), deciding[0])
        assert chosen is not None and 0 < int(chosen.counts.max()) < 4 * f
        seen.append(operators.seen)
        questions.append(len(asked))
    assert seen[0] == seen[1], {k: (seen[0][k], seen[1][k]) for k in seen[0] | seen[1] if seen[0][k] != seen[1][k]}
    assert questions[0] == questions[1] <= 1
    assert sum(seen[0][read] for read in Operators.READS) <= 1
