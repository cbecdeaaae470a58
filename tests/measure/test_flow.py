"""Knock-outs against masks written out by hand, what they must leave alone, and what is suggested from them."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from vtprune.models.base import ADAPTERS

import vtprune
from prompts import heads
from vtprune.check.case import Case
from vtprune.cli.main import main
from vtprune.core.planning import bind, load_recipe
from vtprune.core.recipe import Recipe
from vtprune.inputs.chats import prepare
from vtprune.measure import flow
from vtprune.measure.samples import scenes_samples
from vtprune.show.figures.flow import flow_figure
from vtprune.show.figures.style import encode


def built(family: str = "llava", variant: str | None = None) -> tuple[Any, dict[str, Any]]:
    tiny = ADAPTERS.get(family).tiny
    return (tiny[variant] if variant else next(iter(tiny.values())))()


def by_hand(model: Any, inputs: dict[str, Any], pairs: torch.Tensor, layers: range) -> torch.Tensor:
    """The logits at the last column with the pairs out of the attention of these layers, softmax by softmax."""
    adapter = bind(model)
    model.set_attn_implementation("eager")
    hooks = []
    for i in layers:

        def out(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            mask = kwargs["attention_mask"].clone()
            for b, row, column in pairs.nonzero().tolist():
                mask[b, 0, row, column] = -torch.inf
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(adapter.decoder_layers()[i].register_forward_pre_hook(out, with_kwargs=True))
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits[:, -1].float()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3", "causal-lm"])
def test_a_knock_out_is_what_the_mask_says(family):
    model, inputs = built(family)
    parts = flow.places(bind(model), inputs)
    name = "image->last" if family == "causal-lm" else "image->question"
    pairs = flow.blocked(parts, name)
    assert bool(pairs.any())
    got = flow.knocked_out(model, inputs, pairs, range(1, 3))
    want = by_hand(model, inputs, pairs, range(1, 3))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, flow.knocked_out(model, inputs, pairs, ()), atol=1e-4)


def test_what_changes_nothing():
    """No layers, no pairs, pairs above the diagonal, rows that nobody reads any more."""
    model, inputs = built()
    parts = flow.places(bind(model), inputs)
    with torch.no_grad():
        want = model(**inputs).logits[:, -1].float()
    above = flow.blocked(parts, "last->image")
    assert not bool(above.tril().any())
    for pairs, layers in (
        (flow.blocked(parts, "image->last"), ()),
        (torch.zeros_like(above), range(6)),
        (above, range(6)),
    ):
        torch.testing.assert_close(flow.knocked_out(model, inputs, pairs, layers), want, rtol=1e-5, atol=1e-6)
    nobody = flow.knocked_out(model, inputs, flow.blocked(parts, "image->question"), range(5, 6))
    torch.testing.assert_close(nobody, want, rtol=1e-5, atol=1e-6)


def test_the_image_knocked_out_everywhere_is_a_prompt_without_it():
    """From layer 0 on, for all text: the model that drops all visual tokens in front of layer 0."""
    model, inputs = built()
    parts = flow.places(bind(model), inputs)
    pairs = flow.blocked({**parts, "rest": parts["all"] & ~parts["image"]}, "image->rest")
    got = flow.knocked_out(model, inputs, pairs, range(6))
    with vtprune.attach(model, "drop-all", layer=0), torch.no_grad():
        want = model(**inputs).logits[:, -1].float()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_percent_of_the_models_own_token_and_the_models_state_afterwards():
    model, inputs = built()
    before = torch.tensor([float(p.detach().sum()) for p in model.parameters()])
    with torch.no_grad():
        base = model(**inputs).logits[:, -1].float().softmax(-1)
    lost = flow.knockout(model, inputs, ("image->last", "question->last"), window=3)
    assert lost.shape == (2, 6, 2) and float(lost.min()) >= -100
    token = base.argmax(-1)
    pairs = flow.blocked(flow.places(bind(model), inputs), "question->last")
    q = by_hand(model, inputs, pairs, range(2, 5)).softmax(-1)
    p = base.gather(1, token[:, None])[:, 0]
    want = 100 * (q.gather(1, token[:, None])[:, 0] - p) / p
    torch.testing.assert_close(lost[1, 3], want, rtol=1e-3, atol=1e-3)
    assert torch.equal(before, torch.tensor([float(p.detach().sum()) for p in model.parameters()]))
    assert "forward" not in model.__dict__ and not model.model.language_model.layers[2]._forward_pre_hooks


def test_windows_shrink_at_the_ends():
    assert flow.windows(4, 3) == [range(0, 2), range(0, 3), range(1, 4), range(2, 4)]
    assert flow.windows(3, 5) == [range(0, 3)] * 3  # as wide as the stack: a constant curve
    assert [flow.window_of(n) for n in (2, 6, 12, 32, 40)] == [1, 3, 3, 9, 11]
    for window in (0, 2, -1):
        with pytest.raises(vtprune.VtpruneError, match="odd"):
            flow.windows(4, window)


def test_refusals():
    model, inputs = built()
    parts = flow.places(bind(model), inputs)
    with pytest.raises(vtprune.VtpruneError, match=r"flow 'image->answer' must lead"):
        flow.blocked(parts, "image->answer")
    with pytest.raises(vtprune.UnsupportedError, match="without anything to read"):
        flow.knocked_out(model, inputs, flow.blocked(parts, "all->last"), range(2))
    vit, _ = built("hf-vit")
    with pytest.raises(vtprune.UnsupportedError, match="no language model"):
        flow.knockout(vit, inputs)


def single(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The first prompt alone, without padding."""
    return Case(model, load_recipe("random"), inputs, {}).samples()[0]


def weights_by_hand(lm: Any, number: int, x: torch.Tensor) -> torch.Tensor:
    """``[T, T]``: the mean over heads of the attention of a Llama's layer to the rows ``x`` ``[T, C]``, value by
    value."""
    n = len(x)
    queries, keys = heads(SimpleNamespace(model=lm, config=lm.config), x, list(range(n)), number)
    mean = torch.zeros(n, n, dtype=torch.float64)
    for qs, ks in zip(queries, keys, strict=True):
        for t in range(n):
            e = [math.exp(float(qs[t] @ ks[s]) / math.sqrt(len(qs[t]))) for s in range(t + 1)]
            for s in range(t + 1):
                mean[t, s] += e[s] / sum(e) / len(queries)
    return mean


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "causal-lm"])
def test_numbers_layer_by_layer_are_their_formulas(family):
    model, inputs = built(family)
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in single(model, inputs).items()}
    adapter = bind(model)
    lm, head = adapter.lm, model.get_output_embeddings().weight
    rows: list[torch.Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda m, args: rows.append(args[0][0])) for m in (*lm.layers, lm.norm)]
    logits = model(**inputs).logits[0, -1]
    for hook in hooks:
        hook.remove()
    image = adapter.prunable(inputs)[0].nonzero()[:, 0].tolist()
    n, layers = inputs["input_ids"].shape[1], len(lm.layers)
    text = [t for t in range(image[0], n) if t not in image]
    high: dict[int, float] = {}
    for span in adapter.parts(inputs["input_ids"], inputs)[0]:
        for place, column in enumerate(span.columns.tolist()):
            high[column] = (place // span.grid[1] + 0.5) / span.grid[0]
    assert len({high[j] for j in image}) > 1
    token, whole = int(logits.argmax()), logits.softmax(-1)
    got = flow.layer_by_layer(model, inputs)

    def seen(x: torch.Tensor) -> float:
        scaled = x / (x.pow(2).mean() + lm.norm.variance_epsilon).sqrt() * lm.norm.weight
        return float((head @ scaled).softmax(-1)[token])

    for i in range(layers):
        before, behind = rows[i], rows[i + 1]
        cosines = [float(before[j] @ behind[j] / before[j].norm() / behind[j].norm()) for j in image]
        attention = weights_by_hand(lm, i, before)
        to = {j: sum(float(attention[t, j]) for t in text) / len(text) for j in image}
        total, middle = sum(to.values()), sum(high[j] for j in image) / len(image)
        pairs = torch.zeros(1, n, n, dtype=torch.bool)
        for t in set(range(n)) - set(image):
            for j in image:
                pairs[0, t, j] = True
        left = by_hand(model, inputs, pairs, range(i, layers))[0].double().softmax(-1)
        want = {
            "lens": seen(behind[-1]),
            "visual_lens": sum(seen(behind[j]) for j in image) / len(image),
            "to_image": total,
            "row_bias": sum(to[j] * high[j] for j in image) / total - middle,
            "cosine": sum(cosines) / len(image),
            "withdrawn": float((whole * (whole.log() - left.log())).sum()),
        }
        assert set(want) == set(flow.NUMBERS)
        for name, value in want.items():
            assert got[name][i] == pytest.approx(value, rel=1e-3, abs=2e-5), (name, i)


def test_parts_attend_as_before():
    """Whose parts attend in several ways, and cannot all in one: PaliGemma 2."""
    model, inputs = built("paligemma", "gemma2")
    parts = [m for m in model.modules() if hasattr(m, "set_attn_implementation")]
    before = [m.config._attn_implementation for m in parts]
    assert set(flow.layer_by_layer(model, single(model, inputs))) == set(flow.NUMBERS)
    assert [m.config._attn_implementation for m in parts] == before


def test_encoders_run_once():
    model, inputs = built()
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *a: calls.append(1))
    with flow.encoded_once(model), torch.no_grad():
        a, b = model(**inputs).logits, model(**inputs).logits
        other = model(**{**inputs, "pixel_values": inputs["pixel_values"] + 1}).logits
    hook.remove()
    assert torch.equal(a, b) and not torch.equal(a, other) and len(calls) == 2
    assert "get_image_features" not in model.model.__dict__


def told(withdrawn: list[float]) -> dict[str, Any]:
    return {"type": "vtprune.Flow", "abilities": {"all": {"withdrawn": {"mean": withdrawn}}}}


def test_suggestions():
    found = flow.suggest(told([4.0, 4.0, 1.9, 2.1, 1.0, 0.4, 0.01, 0.0]))
    options = {name: one["recipe"]["stages"][0]["options"] for name, one in found.items()}
    # layer 2 is under one half, but layer 3 is not
    assert options["pyramiddrop"] == {"layers": [4, 5], "ratios": [0.25, 0.125]}
    assert options["vtw"] == {"layer": 6} and options["dpvr-lf"] == {"split": 6}
    assert found["pyramiddrop"]["share"] == round((4 * 1 + 0.25 + 3 * 0.125) / 8, 4)
    assert found["vtw"]["share"] == 0.75 and "costs 0.01 of 4 nats" in found["vtw"]["expects"]
    assert flow.suggest(told([4.0, 4.0, 4.0, 3.0])) == {}
    assert set(flow.suggest(told([4.0, 0.1]))) == {"pyramiddrop", "vtw"}
    model, inputs = built()
    for one in found.values():
        recipe = Recipe.from_dict(one["recipe"])
        if max(max(v) if isinstance(v, list) else v for v in recipe.stages[0].options.values()) < 6:
            with vtprune.attach(model, recipe), torch.no_grad():
                model(**inputs)
    for wrong, why in (({"tolerance": 0.0}, "tolerance"), ({"ability": "taste"}, "no ability 'taste'")):
        with pytest.raises(vtprune.VtpruneError, match=why):
            flow.suggest(told([1.0, 0.5]), **wrong)
    with pytest.raises(vtprune.VtpruneError, match="changes nothing"):
        flow.suggest(told([0.0, 0.0]))


@pytest.mark.ci
def test_the_bundled_model_from_questions_to_a_figure(tmp_path, capsys):
    model, processor = vtprune.load_demo_model()
    samples = scenes_samples(1, "train")[:2]
    done: list[int] = []
    made = flow.flow(model, processor, samples, flows=("image->last",), window=11, progress=done.append)
    assert done == [1, 1] and made["layers"] == 12 and made["window"] == 11
    every = made["abilities"]["all"]
    assert every["correct"] == sum(one["correct"] for name, one in made["abilities"].items() if name != "all")
    for name in ("image->last", *flow.NUMBERS):
        assert len(every[name]["mean"]) == 12
    assert every["lens"]["mean"][-1] > 0.5  # behind the last layer it is the answer's own probability
    inputs = prepare(processor, [samples[0].shown()], [samples[0].question])
    with torch.no_grad():
        p = float(model(**inputs).logits[0, -1].softmax(-1).max())
    assert flow.layer_by_layer(model, inputs)["lens"][-1] == pytest.approx(p, rel=1e-4)
    picture = encode(flow_figure(made), "png")
    (tmp_path / "flow.png").write_bytes(picture)
    assert Image.open(tmp_path / "flow.png").width > 1000
    (tmp_path / "flow.json").write_text(json.dumps(made))
    assert main(["analyze", "suggest", str(tmp_path / "flow.json"), "--folder", str(tmp_path / "found")]) == 0
    assert "effective tokens" in capsys.readouterr().out
    for path in (tmp_path / "found").iterdir():
        assert Recipe.load(path).stages
    (tmp_path / "wrong.json").write_text("{}")
    assert main(["analyze", "suggest", str(tmp_path / "wrong.json")]) == 1
    assert "is not what vtprune analyze flow writes" in capsys.readouterr().err


@pytest.mark.ci
def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    """The command asks, tells in a table, and writes what ``suggest`` and a figure are made of."""
    monkeypatch.setenv("COLUMNS", "300")  # the table in one piece
    first = scenes_samples(1, "train")[:1]
    monkeypatch.setattr("vtprune.cli.flow.scenes_samples", lambda scenes, split: first)
    out = [str(tmp_path / f"flow.{kind}") for kind in ("json", "svg")]
    assert main(["analyze", "flow", "--window", "23", "--out", out[0], "--out", out[1]]) == 0
    table = capsys.readouterr().out.splitlines()
    made = json.loads((tmp_path / "flow.json").read_text())
    every = made["abilities"]["all"]
    assert table[0] == f"{every['correct']} of 1 questions answered; windows of 23 layers"
    heads = [cell.strip() for cell in re.split(r"\s{2,}", table[2].strip())]
    assert heads == ["layer", *flow.FLOWS, "lens", "visual lens", "to image", "row bias", "cosine", "withdrawn"]
    last = re.split(r"\s{2,}", table[-1].strip())
    assert last[0] == "11" and last[-6:] == [f"{every[name]['mean'][11]:.3f}" for name in flow.NUMBERS]
    assert made["command"].startswith("vtprune analyze flow --window 23") and (tmp_path / "flow.svg").read_text()
    assert all(len(set(every[name]["mean"])) == 1 for name in flow.FLOWS)  # windows as wide as the stack
    assert main(["analyze", "suggest", out[0], "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) <= {"pyramiddrop", "vtw", "dpvr-lf"}


def test_arguments_that_make_no_sense(capsys):
    for wrong, code in ((["--window", "2"], 2), (["--scenes", "0"], 2), (["--out", "flow.txt"], 1)):
        assert main(["analyze", "flow", *wrong]) == code
    assert "not odd" in (told := capsys.readouterr().err) and "its name ends in" in told
