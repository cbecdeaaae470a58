"""Tower and projector without a language model, rows that say where they stand, and what a vLLM server is told."""

from __future__ import annotations

import base64
import io
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from vtprune.models.base import ADAPTERS

import vtprune
from cases import mixes_pictures
from vtprune.core.planning import load_recipe
from vtprune.inputs import demo_model
from vtprune.inputs.chats import image_part, prepare, prepare_chats, prompt_ids, text_part
from vtprune.serving import eyes
from vtprune.serving.openai import content
from vtprune.serving.placed import AXES, CHANNELS, LARGEST, check, parted, placed
from vtprune.serving.vllm import register, settings
from vtprune.serving.vllm.launch import environment, server_command

ENCODES = pytest.mark.skipif(mixes_pictures(), reason="this transformers takes no encoded images")


def pictures(count: int) -> list[Image.Image]:
    numbers = torch.Generator().manual_seed(count)
    pixels = (torch.rand(count, 168, 168, 3, generator=numbers) * 255).to(torch.uint8).numpy()
    return [Image.fromarray(p) for p in pixels]


@pytest.fixture(scope="module")
def demo():
    return vtprune.load_demo_model()


@pytest.fixture(scope="module")
def seeing():
    from transformers import AutoConfig

    return eyes.load(demo_model.FOLDER, AutoConfig.from_pretrained(demo_model.FOLDER), torch.float32, "cpu")


# --------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_places_survive_every_precision(dtype):
    torch.manual_seed(0)
    offsets = torch.randint(0, LARGEST - 1, (AXES, 500))
    offsets[:, 0] = torch.tensor([0, 127, LARGEST - 1])
    rows = torch.randn(500, 8).to(dtype)
    wide = placed(rows, offsets, LARGEST)
    assert wide.shape == (500, 8 + CHANNELS) and wide.dtype == dtype
    back, where, span = parted(wide)
    assert torch.equal(back, rows) and torch.equal(where, offsets) and (span == LARGEST).all()
    assert check(wide, 8) == LARGEST


@pytest.mark.parametrize("offset, span", [(-1, 4), (4, 4), (0, 0), (0, LARGEST + 1)])
def test_rows_outside_of_their_image_have_no_place(offset, span):
    with pytest.raises(vtprune.VtpruneError, match="no places"):
        placed(torch.zeros(1, 4), torch.full((AXES, 1), offset), span)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda w: w[:, :-1], "numbers here"),
        (lambda w: w[None], "numbers here"),
        (lambda w: w[:0], "do not say where"),
        (lambda w: w.clone().fill_(0.5), "do not say where"),
        (lambda w: torch.randn_like(w), "do not say where"),
        (lambda w: w.index_put((torch.tensor(0), torch.tensor(-3)), torch.tensor(3.0)), "do not say where"),  # span
        (lambda w: w.index_put((torch.tensor(0), torch.tensor(-CHANNELS)), torch.tensor(100.0)), "do not say where"),
        (lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.inf)), "not finite"),
        (lambda w: w.index_put((torch.tensor(0), torch.tensor(-1)), torch.tensor(torch.nan)), "do not say where"),
    ],
)
def test_foreign_rows_are_told_apart(spoil, words):
    wide = placed(torch.zeros(5, 4), torch.arange(5).expand(AXES, -1), 9)
    assert check(wide, 4) == 9
    with pytest.raises(vtprune.VtpruneError, match=words):
        check(spoil(wide), 4)


@ENCODES
def test_encoded_images_say_where_they_stand(demo):
    """Original positions behind those of the image; with compact ones the rows follow each other."""
    model, processor = demo
    inputs = dict(prepare(processor, [pictures(2)], ["what color is it ?"]))
    encoded = vtprune.encode(model, "divprune", inputs, keep=20)
    ids, whole = inputs["input_ids"][0], torch.arange(inputs["input_ids"].shape[1])
    columns = whole[ids == model.config.image_token_id].view(2, 144)
    at = encoded.position_ids[0][encoded.input_ids[0] == model.config.image_token_id].view(2, 20)
    for image, wide in enumerate(encoded.placed):
        rows, offsets, span = parted(wide)
        assert torch.equal(rows, encoded.embeds[image]) and (span == 144).all()
        assert torch.equal(offsets[0] + columns[image, 0], at[image])
        assert torch.equal(offsets[0], offsets[1]) and torch.equal(offsets[0], offsets[2])
    compact = vtprune.encode(model, "divprune", inputs, keep=20, positions="compact")
    _, offsets, span = parted(compact.placed[1])
    assert offsets[0].tolist() == list(range(20)) and (span == 20).all()


# ----------------------------------------------------------------------------------------------------------------- eyes

SERVED = ["apet", "divprune", "evocut", "flowcut", "hiprune", "keep-last", "pitome", "pool", "scope", "tome", "uniform"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [*SERVED, "visionzip", "vispruner", "vomix", "turbo", "hired", "holov", "random"])
@ENCODES
def test_images_alone_become_what_they_become_in_a_prompt(demo, seeing, name):
    model, processor = demo
    inputs = dict(prepare(processor, pictures(3), ["what color is it ?"] * 3))
    recipe = load_recipe(name)
    whole = vtprune.encode(model, recipe, inputs).placed
    seer, sizes = eyes.Eyes(seeing, recipe), eyes.Sizes(model.config, recipe)
    alone = seer.see([{"pixel_values": pixels[None]} for pixels in inputs["pixel_values"]])
    seer.encoder.handle.remove()
    rasters = sizes.rasters({})
    assert sizes.span(rasters) == 144 and {len(w) for w in alone} == {sizes.left(rasters)}
    for a, b in zip(alone, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@ENCODES
def test_a_request_has_a_budget_of_its_own(demo, seeing):
    model, processor = demo
    pixels = prepare(processor, pictures(1), ["what color is it ?"])["pixel_values"]
    recipe = load_recipe("uniform")
    seer, sizes = eyes.Eyes(seeing, recipe), eyes.Sizes(model.config, recipe)
    for keep, rows in ((None, 72), (9, 9), (0.25, 36), (1, 1), (1.0, 144)):
        assert len(seer.see([{"pixel_values": pixels}], keep)[0]) == sizes.left(sizes.rasters({}), keep) == rows
    seer.encoder.handle.remove()
    with pytest.raises(vtprune.VtpruneError, match="keep"):
        sizes.left(sizes.rasters({}), 145)


def tiny(family: str):
    return next(iter(ADAPTERS.get(family).tiny.values()))()


def apart(pixels: torch.Tensor, grids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """What the processor makes of each image, as a batch of one."""
    rows = pixels.split(grids.prod(1).tolist())
    return [{"pixel_values": p, "image_grid_thw": g[None]} for p, g in zip(rows, grids, strict=True)]


QWEN = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("name", ["divprune", "uniform", "vispruner", "apet"])
@ENCODES
def test_images_of_any_size(family, name, tmp_path):
    """Their places have three axes, and DeepStack's planes stand behind each row."""
    model, inputs = tiny(family)
    recipe = load_recipe(name).override(keep=0.5)
    whole = vtprune.encode(model, recipe, inputs)
    model.save_pretrained(tmp_path)
    seeing = eyes.load(tmp_path, model.config, torch.float32, "cpu")
    seer, sizes = eyes.Eyes(seeing, recipe), eyes.Sizes(model.config, recipe)
    images = apart(inputs["pixel_values"], inputs["image_grid_thw"])
    moving = [i.kind == "video" for i in whole.items]
    wanted = [w for w, video in zip(whole.placed, moving, strict=True) if not video]
    alone = seer.see(images)
    for image, a, b in zip(images, alone, wanted, strict=True):
        rasters = sizes.rasters(image)
        assert len(a) == sizes.left(rasters) and (parted(a)[2] == sizes.span(rasters)).all()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("behind", [None, 3, 0.9])
@ENCODES
def test_what_pixels_decide_is_known_before_the_tower(family, behind, dtype, tmp_path):
    """Blocks that their neighbours predict are counted by the processor alone, and by a stage behind those are left."""
    model, inputs = tiny(family)
    model.save_pretrained(tmp_path)
    levels = torch.randint(-1, 2, inputs["pixel_values"].shape[:1], generator=torch.Generator().manual_seed(0)) * 0.1
    flat = levels[:, None].expand_as(inputs["pixel_values"]).clone()
    pixels = flat.view(-1, 4, flat.shape[1])[:, :1].expand(-1, 4, -1).flatten(0, 1)  # four patches of a block alike
    stages = [vtprune.Stage(method="pixelprune", options={"threshold": 0.06})]
    stages += [] if behind is None else [vtprune.Stage(method="divprune", keep=behind)]
    recipe = vtprune.Recipe(name="mine", stages=tuple(stages))
    sizes = eyes.Sizes(model.config, recipe, dtype)
    assert sizes.reads_pixels and not eyes.Sizes(model.config, load_recipe("uniform")).reads_pixels
    images = apart(pixels, inputs["image_grid_thw"])
    counts = [sizes.left(sizes.rasters(image), image=image) for image in images]
    whole = [sizes.whole(sizes.rasters(image)) for image in images]
    assert sum(counts) < sum(whole)
    if behind is None:
        assert max(c / w for c, w in zip(counts, whole, strict=True)) < 1 and len(set(counts)) > 1
    seer = eyes.Eyes(eyes.load(tmp_path, model.config, dtype, "cpu"), recipe)
    rows = seer.see(images)
    assert [len(r) for r in rows] == counts
    assert [int(parted(r)[2][0]) for r in rows] == [sizes.span(sizes.rasters(image)) for image in images]


@pytest.mark.parametrize(
    "name, words",
    [
        ("mmtok", "reads the question"),
        ("cdpruner", "reads the question"),
        ("prumerge", "not known before"),
        ("pyramiddrop", "inside the language model"),
        ("divprune-then-pyramiddrop", "encode what stands in front"),
    ],
)
def test_what_an_engine_cannot_be_told_beforehand_is_refused(demo, name, words):
    with pytest.raises(vtprune.UnsupportedError, match=words):
        eyes.Sizes(demo[0].config, load_recipe(name))


def test_rows_that_end_in_new_lines_come_encoded():
    model, _ = tiny("llava-onevision")
    with pytest.raises(vtprune.UnsupportedError, match="new|tokens that leave"):
        eyes.Sizes(model.config, load_recipe("uniform"))


def test_a_checkpoint_without_its_tower_is_refused(demo, tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = demo
    model.config.save_pretrained(tmp_path)
    weights = load_file(demo_model.FOLDER / "model.safetensors")
    lost = next(name for name in weights if "projector" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(vtprune.VtpruneError, match="projector"):
        eyes.load(tmp_path, model.config, torch.float32, "cpu")


def test_prompts_for_engines_are_those_of_the_model(demo):
    """One placeholder for each image, and otherwise the same tokens."""
    model, processor = demo
    image = model.config.image_token_id
    chats = [[{"role": "user", "content": [*map(image_part, pictures(2)), text_part("what color is it ?")]}]]
    whole = prepare_chats(processor, chats)["input_ids"][0].tolist()
    (short,) = prompt_ids(processor, chats)
    assert short.count(image) == 2 and whole.count(image) == 288
    assert [t for t in whole if t != image] == [t for t in short if t != image]


# ------------------------------------------------------------------------------------------------------------- settings


def test_the_plug_in_does_nothing_unless_it_is_told(monkeypatch):
    """There is no vLLM here: it would fail to import it."""
    monkeypatch.delenv(settings.RECIPE, raising=False)
    register()
    monkeypatch.setenv(settings.RECIPE, "divprune")
    with pytest.raises(ImportError):
        register()


@pytest.mark.parametrize(
    "recipe, keep, kwargs, wanted",
    [
        ("divprune", None, None, 0.098),
        ("divprune", "36", None, 36),
        ("divprune", "0.25", {"other": 1}, 0.25),
        ("divprune", "36", {"vtprune": {"keep": 9}}, 9),
        ("divprune", None, {"vtprune": {}}, 0.098),
    ],
)
def test_recipe_and_budget_of_a_server(monkeypatch, recipe, keep, kwargs, wanted):
    monkeypatch.setenv(settings.RECIPE, recipe)
    monkeypatch.delenv(settings.KEEP, raising=False)
    if keep is not None:
        monkeypatch.setenv(settings.KEEP, keep)
    stage = settings.from_environment(kwargs).stages[-1]
    assert stage.keep == wanted or (wanted == 0.098 and stage.keep is None)


@pytest.mark.parametrize("keep", ["many", "1e", "nan", "-3", "0"])
def test_budgets_that_are_none(monkeypatch, keep, demo):
    monkeypatch.setenv(settings.RECIPE, "divprune")
    monkeypatch.setenv(settings.KEEP, keep)
    with pytest.raises(vtprune.VtpruneError):
        eyes.Sizes(demo[0].config, settings.from_environment())


@pytest.mark.parametrize("ours", [{"recipe": "tome"}, 36, {"keep": "36"}, {"keep": True}, {"keep": float("nan")}, []])
def test_keywords_that_would_be_ignored(ours):
    with pytest.raises(vtprune.VtpruneError):
        settings.asked({"vtprune": ours})


def fake(**text) -> SimpleNamespace:
    """A vLLM configuration as far as it is read."""
    inner = SimpleNamespace(rope_parameters={"rope_type": "default"}, sliding_window=None, **text)
    config = SimpleNamespace(get_text_config=lambda: inner)
    images = SimpleNamespace(video_pruning_rate=None, mm_processor_kwargs={"vtprune": {"keep": 9}, "size": 3})
    return SimpleNamespace(hf_config=config, multimodal_config=images, uses_mrope=False, text=inner)


def test_a_model_is_prepared(monkeypatch):
    monkeypatch.setenv(settings.RECIPE, "divprune")
    monkeypatch.delenv(settings.KEEP, raising=False)
    told = fake()
    settings.Prepared.verify_and_update_model_config(told)
    assert told.multimodal_config.mm_processor_kwargs == {"size": 3}
    assert told.multimodal_config.video_pruning_rate and told.hf_config.mrope_section == [1, 1, 1]
    assert settings.recipe_of(told.hf_config).stages[-1].keep == 9


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda t: t.text.rope_parameters.update(rope_type="yarn"), "yarn"),
        (lambda t: t.text.rope_parameters.update(rope_type="dynamic"), "dynamic"),
        (lambda t: setattr(t.text, "sliding_window", 4096), "windows of 4096"),
        (lambda t: setattr(t.multimodal_config, "video_pruning_rate", 0.5), "own pruning"),
        (lambda t: setattr(t, "multimodal_config", None), "no images"),
    ],
)
def test_a_model_that_would_answer_otherwise_is_refused(monkeypatch, spoil, words):
    monkeypatch.setenv(settings.RECIPE, "divprune")
    told = fake()
    spoil(told)
    with pytest.raises(vtprune.VtpruneError, match=words):
        settings.Prepared.verify_and_update_model_config(told)


def test_front_ends_and_towers_that_would_run_past_the_recipe_are_refused(monkeypatch):
    monkeypatch.setenv(settings.RECIPE, "divprune")
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(vtprune.UnsupportedError, match="RUST"):
        settings.Prepared.verify_and_update_model_config(fake())
    for graphs, speculative, words in ((True, None, "cudagraph"), (False, {}, "speculative")):
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(cudagraph_mm_encoder=graphs), speculative_config=speculative
        )
        with pytest.raises(vtprune.UnsupportedError, match=words):
            settings.Prepared.verify_and_update_config(config)


def test_the_command_that_serves(tmp_path):
    recipe = load_recipe("divprune").override(keep=36)
    told = environment(recipe, tmp_path)
    assert load_recipe(told[settings.RECIPE]).key() == recipe.key()
    assert environment(None) == {settings.RECIPE: settings.ENCODED}
    command = server_command(None, "127.0.0.1", 8001, "float32", 3, ["--max-model-len", "512"])
    assert command[1:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert command[command.index("--limit-mm-per-prompt") + 1] == json.dumps({"image": 3})
    assert command[-2:] == ["--max-model-len", "512"] and "vtprune-demo" in command


@ENCODES
def test_placed_images_as_parts_of_a_message(demo):
    model, processor = demo
    encoded = vtprune.encode(model, "uniform", dict(prepare(processor, pictures(1), ["what color is it ?"])), keep=9)
    (image, text) = content(encoded, "what ?", placed=True)
    rows = torch.load(io.BytesIO(base64.b64decode(image["image_embeds"])), weights_only=True)
    assert torch.equal(rows, encoded.placed[0]) and text["text"] == "what ?"
