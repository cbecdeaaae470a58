"""Fitting: VTW's layer and FitPrune's counts against slow transcriptions that read the dense model's own outputs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BatchFeature
from vtprune.models.base import ADAPTERS

import vtprune
from fake import picture
from fake import tiny as fake_model
from vtprune.cli import main, models
from vtprune.inputs.chats import prepare
from vtprune.measure import fit
from vtprune.measure.samples import Sample, scenes_samples

SAMPLES = [Sample(picture(i), q, "", "") for i, q in enumerate(["what is it", "is the big one red then", "where"])]


def shown(processor, sample: Sample):
    return prepare(processor, [sample.picture()], [sample.question])


@torch.no_grad()
def divergences(model, processor) -> dict[int, float]:
    """By layer, ``sum p ln(p / q)`` with every visual token gone before it, mean over prompts, one at a time."""
    found = {}
    for layer in range(1, 6):
        total = 0.0
        for sample in SAMPLES:
            inputs = shown(processor, sample)
            full = model(**inputs).logits[0, -1].double().softmax(0).tolist()
            with vtprune.attach(model, "drop-all", layer=layer):
                rest = model(**inputs).logits[0, -1].double().softmax(0).tolist()
            total += sum(p * torch.tensor(p / q).log().item() for p, q in zip(full, rest, strict=True))
        found[layer] = total / len(SAMPLES)
    return found


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_the_first_layer_below_the_threshold(batch):
    model, processor = fake_model()
    want = divergences(model, processor)
    ticks: list[int] = []
    for layer in (1, 3, 5):
        threshold = want[layer] * 1.001
        first = next(i for i, kl in want.items() if kl < threshold)
        found = fit.withdrawal(model, processor, SAMPLES, threshold=threshold, batch=batch, progress=ticks.append)
        assert found.recipe.stages[0].method == "vtw" and found.recipe.stages[0].options == {"layer": first}
        assert found.facts["kl"] == pytest.approx({i: want[i] for i in range(1, first + 1)}, rel=1e-3, abs=1e-9)
        assert sum(ticks) == 3 * (1 + first)
        ticks.clear()
    with pytest.raises(vtprune.VtpruneError, match="no layer's withdrawal stays below"):
        fit.withdrawal(model, processor, SAMPLES, threshold=min(want.values()) / 2)


@torch.no_grad()
def shares(model, processor) -> list[list[float]]:
    """Of layers 0 to 4 the share of the attention that goes with the k least important of 16 tokens, k = 0 to 16: the
    larger of both kinds, mean over pictures."""
    model.set_attn_implementation("eager")
    kinds = [[[0.0] * 17, [0.0] * 17] for _ in range(5)]
    for sample in SAMPLES:
        inputs = shown(processor, sample)
        ids = inputs["input_ids"][0].tolist()
        visual = [i for i, token in enumerate(ids) if token == model.config.image_token_id]
        behind = range(visual[-1] + 1, len(ids))
        for layer, maps in enumerate(model(**inputs, output_attentions=True).attentions[:5]):
            largest = maps[0].double().amax(0).tolist()
            received = [[sum(largest[i][j] for i in rows) for j in visual] for rows in (visual, behind)]
            order = sorted(range(16), key=lambda c: received[0][c] * received[1][c])
            for kind, values in zip(kinds[layer], received, strict=True):
                for k in range(17):
                    kind[k] += sum(values[c] for c in order[:k]) / sum(values) / len(SAMPLES)
    return [[max(a, b) for a, b in zip(*kind, strict=True)] for kind in kinds]


def counts(lost: list[list[float]], alpha: float, least: int) -> list[int]:
    left = [16]
    for layer in lost:
        removed = max(k for k in range(17) if layer[k] <= alpha + 1e-7)
        left.append(max(least, min(left[-1], 16 - removed)))
    return left


@pytest.mark.parametrize("keep", [1, 5, 0.5, 15])
def test_a_number_of_tokens_is_left_at_the_end(keep):
    model, processor = fake_model()
    lost, last = shares(model, processor), int(keep * 16) if isinstance(keep, float) else keep
    alphas = sorted({share for layer in lost for share in layer})
    want = next(c for alpha in alphas if (c := counts(lost, alpha, last))[-1] <= last)
    model, processor = fake_model()
    found = fit.removals(model, processor, SAMPLES, keep=keep, batch=2)
    assert found.facts["left"] == want and want[-1] == last
    used = _layer_tokens(model, processor, found.recipe)
    assert used == [want] * 3


def _layer_tokens(model, processor, recipe) -> list[list[int]]:
    out = []
    with vtprune.attach(model, recipe) as handle, torch.no_grad():
        for sample in SAMPLES:
            model(**shown(processor, sample))
            out += handle.report().layer_tokens
    return out


def test_many_tokens_that_go_at_once_do_not_go_below_the_budget(monkeypatch):
    """Ten tokens of equal importance: two are enough."""
    steps = torch.tensor([[0.0] + [0.5] * 10 + [1.0] * 6] * 5, dtype=torch.float64)
    monkeypatch.setattr(fit, "_lost", lambda *a: steps)
    found = fit.removals(*fake_model(), SAMPLES, keep=14)
    assert found.recipe.stages[0].options == {"layers": [1], "counts": [14]}
    assert found.facts["threshold"] == pytest.approx(0.5)


@pytest.mark.parametrize("effective", [0.3, 0.7, 9])
def test_a_number_of_effective_tokens(effective):
    model, processor = fake_model()
    lost, most = shares(model, processor), effective * 16 if effective < 1 else effective
    alphas = sorted({share for layer in lost for share in layer})
    want = next(c for alpha in alphas if sum(c := counts(lost, alpha, 1)) / 6 <= most)
    model, processor = fake_model()
    ticks: list[int] = []
    found = fit.removals(model, processor, SAMPLES, effective_tokens=effective, progress=ticks.append)
    assert found.facts["left"] == want and found.facts["effective_tokens"] == pytest.approx(sum(want) / 6)
    assert found.recipe.stages[0].options["layers"] == [i for i in range(1, 6) if want[i] < want[i - 1]]
    assert sum(ticks) == 6


def test_images_of_several_sizes_get_fractions(tiny, monkeypatch):
    model, inputs = tiny("qwen2-vl", next(iter(ADAPTERS.get("qwen2-vl").tiny)))
    monkeypatch.setattr(fit, "_inputs", lambda *a: [BatchFeature(inputs)])
    found = fit.removals(model, None, SAMPLES, keep=0.5)
    options = found.recipe.stages[0].options
    assert all(isinstance(k, float) and 0.5 <= k <= 1 for k in options["counts"])
    with vtprune.attach(model, found.recipe) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    assert all(row[-1] * 2 <= row[0] + 1 for row in report.layer_tokens)
    with pytest.raises(vtprune.VtpruneError, match="give a fraction"):
        fit.removals(model, None, SAMPLES, keep=5)


@pytest.mark.parametrize(
    "budget, says",
    [
        ({}, "exactly one"),
        ({"keep": 3, "effective_tokens": 0.5}, "exactly one"),
        ({"keep": 17}, "16 visual tokens"),
        ({"keep": 1.0}, "nothing to fit"),
        ({"effective_tokens": 1}, "can meet this budget"),
        ({"effective_tokens": 17}, "at most the 16"),
        ({"effective_tokens": -0.5}, "above 0"),
    ],
)
def test_budgets_that_are_none(budget, says):
    with pytest.raises(vtprune.VtpruneError, match=says):
        fit.removals(*fake_model(), SAMPLES, **budget)


def test_nothing_to_fit_on(tiny):
    for way in (fit.withdrawal, lambda *a: fit.removals(*a, keep=3)):
        with pytest.raises(vtprune.VtpruneError, match="nothing to fit on"):
            way(*fake_model(), [])
    model, _ = tiny("timm-vit", "class")
    with pytest.raises(vtprune.UnsupportedError, match="no language model"):
        fit.removals(model, None, SAMPLES, keep=3)


@pytest.fixture
def vlm(monkeypatch):
    monkeypatch.setattr(models, "load", lambda args: fake_model())


def test_the_command_writes_a_recipe(capsys, vlm, tmp_path):
    picture().save(tmp_path / "a.png")
    asked = ["--image", str(tmp_path / "a.png"), "--question", "what is it"] * 2
    out = tmp_path / "vtw.json"
    words = ["fit", "vtw", "--recipe-out", str(out), "--threshold", "1000", *asked]
    assert main.main(words) == 0
    told = capsys.readouterr().out
    assert f"wrote {out}" in told and "2 prompts" in told
    assert vtprune.Recipe.load(out).stages[0].options == {"layer": 1}
    out = tmp_path / "counts.yaml"
    assert main.main(["fit", "fitprune", "--recipe-out", str(out), "--keep", "4", "--json", *asked]) == 0
    told = json.loads(capsys.readouterr().out)
    recipe = vtprune.Recipe.load(out)
    assert vtprune.Recipe.from_dict(told["recipe"]) == recipe and told["left"][-1] == 4 and told["prompts"] == 2
    with vtprune.attach(fake_model()[0], recipe) as handle:
        assert handle.recipe.name == "fitprune (fitted)"


def test_generated_pictures_are_those_of_the_training_set(capsys, vlm, tmp_path, monkeypatch):
    """About 11 questions a picture; none is one of those that methods are compared on."""
    seen = []
    monkeypatch.setattr("vtprune.cli.fit.withdrawal", lambda m, p, samples, **more: seen.append(samples) or _fitted())
    assert main.main(["fit", "vtw", "--recipe-out", str(tmp_path / "x.json"), "--images", "2"]) == 0
    assert len({s.source for s in seen[0]}) == 2 and len(seen[0]) > 15
    tested = [s.picture().tobytes() for s in scenes_samples(2)]
    assert not any(s.picture().tobytes() in tested for s in seen[0])


def _fitted():
    return fit.Fit(vtprune.Recipe(name="x", stages=(vtprune.Stage(method="vtw"),)), {"kl": {1: 0.1}})


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["vtw", "--keep", "3"], 2, "unrecognized"),
        (["fitprune"], 2, "required"),
        (["fitprune", "--keep", "3", "--effective-tokens", "0.5"], 2, "not allowed"),
        (["vtw", "--question", "what"], 1, "one --question for each --image"),
        (["vtw", "--threshold", "0"], 2, "above 0"),
    ],
)
def test_wrong_calls(capsys, vlm, tmp_path, words, code, says):
    assert main.main(["fit", *words, "--recipe-out", str(tmp_path / "x.json")]) == code
    assert says in capsys.readouterr().err
    assert main.main(["fit", "vtw", "--recipe-out", str(tmp_path / "x.txt")]) == 1
    assert "ends in .json" in capsys.readouterr().err
