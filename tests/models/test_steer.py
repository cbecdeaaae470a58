"""Steering (VISTA, arXiv 2502.03628) against a slow transcription of its equations: one sample at a time, unpadded,
with hooks of its own."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.host import cache_of, cached
from vtprune.models.engine.steered import blend, inject

import vtprune
from talks import Talk
from vtprune.check.case import Case
from vtprune.core import live
from vtprune.core.ledger import snapshot
from vtprune.core.planning import bind, load_recipe
from vtprune.core.types import UnsupportedError, VtpruneError

FAMILIES = [
    (name, variant)
    for name in ADAPTERS
    for variant in ADAPTERS.get(name).tiny
    if name not in ("hf-vit", "timm-vit", "open-clip", "causal-lm")
]
# norms that stand behind the MLP
BEHIND = {"gemma3": "post_feedforward_layernorm", "gemma2": "post_feedforward_layernorm", "glm4v": "post_mlp_layernorm"}
ALONG = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
ANSWER = [[9, 23, 11], [12, 40, 17]]
LAM, ALPHA, WINDOW = 0.2, 0.3, (4, 5)  # of six layers, 25 and 30 of 32


def loaded(tiny, family: str, variant: str) -> tuple[Any, dict[str, Any]]:
    """In float64, but for experts, whose grouped products have none."""
    model, inputs = tiny(family, variant)
    if any("experts" in name for name, _ in model.named_modules()):
        return model, inputs
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return model.double(), wide


def singles(model: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Every sample alone, without padding."""
    out = []
    for one in Case(model, load_recipe("random"), inputs, {}).samples():
        n = int(one["attention_mask"].sum())
        out.append({k: v[:, -n:] if k in ALONG else v for k, v in one.items()})
    return out


def stack_of(model: Any) -> Any:
    core = model.base_model
    return core.language_model if hasattr(core, "language_model") else core.text_model


def behind(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """New tokens behind a prompt, with positions where the model has three axes of them, as ``generate`` gives them."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    deltas = getattr(model.base_model, "rope_deltas", None)
    if deltas is None:
        return inputs
    places = (mask.cumsum(1) - 1)[:, -ids.shape[1] :] + deltas
    return {**inputs, "position_ids": places.expand(3, -1, -1)}


# ---------------------------------------------------------------------------------------------------- the transcription


def turned(x: Tensor, v: Tensor, lam: float) -> Tensor:
    """Rows ``x`` ``[n, C]`` of one sample."""
    weight = lam * (1 + torch.relu(F.cosine_similarity(x, -v[None], dim=1)))
    mixed = F.normalize(x, dim=1) + torch.outer(weight, F.normalize(v, dim=0))
    return x.pow(2).sum(1, keepdim=True).sqrt() * F.normalize(mixed, dim=1)


class Slow:
    """One sample, its prompt and then token by token."""

    def __init__(self, family: str, model: Any, visual: Any, **options: Any):
        self.model, self.visual = model, visual
        self.lam, self.alpha = options.get("lam", LAM), options.get("alpha", ALPHA)
        self.window, self.norm = options.get("window", WINDOW), options.get("final_norm", False)
        self.layers, self.head = stack_of(model).layers, model.get_output_embeddings()
        behind = BEHIND.get(family, "mlp")
        self.half = behind if hasattr(self.layers[0], behind) else "mlp"  # GLM-4V's experts have none
        self.vectors: list[Tensor] = []

    def run(self, steered: bool, **inputs: Any) -> tuple[Any, list[Tensor]]:
        """The model's output, and each layer's at the last token, ``[C]``."""
        hooks, states = [], dict[int, Tensor]()  # a layer that is run ahead too is run for good later

        def keep(number: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                states[number] = (output[0] if isinstance(output, tuple) else output)[0, -1]

            return hook

        def turn(number: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> Any:
                x = output[0] if isinstance(output, tuple) else output
                rows = turned(x[0], self.vectors[number], self.lam)[None]
                return (rows, *output[1:]) if isinstance(output, tuple) else rows

            return hook

        for number, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_hook(keep(number)))
            if steered:
                hooks.append(getattr(layer, self.half).register_forward_hook(turn(number)))
        try:
            out = self.model(**inputs, use_cache=True)
        finally:
            for hook in hooks:
                hook.remove()
        return out, [states[number] for number in range(len(self.layers))]

    def logits(self, states: list[Tensor]) -> Tensor:
        """Of the last token, ``[V]``."""
        last = stack_of(self.model).norm
        norm = last if self.norm else lambda h: h
        early = [self.head(norm(states[i - 1])) for i in range(self.window[0], self.window[1] + 1)]
        mixed = (1 - self.alpha) * self.head(last(states[-1])) + self.alpha * sum(early) / len(early)
        return mixed if self.cap is None else self.cap * torch.tanh(mixed / self.cap)

    @torch.no_grad()
    def read(self, one: dict[str, Any]) -> Tensor:
        ids = one["input_ids"]
        text = ~self.visual(ids)
        if bool(text.all()):  # no image, no steering
            out = self.model(**one, use_cache=True)
            self.cache, self.width, self.plain = cache_of(out), ids.shape[1], True
            return out.logits[0, -1]
        self.plain = False
        told = self.run(False, **{k: v[text][None] for k, v in one.items() if k in ALONG})[1]
        plain, states = self.run(False, **one)
        self.vectors = [a - b for a, b in zip(states, told, strict=True)]
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        bare = self.head(stack_of(self.model).norm(states[-1]))  # not every release caps PaliGemma 2's logits
        self.cap = None if torch.allclose(bare, plain.logits[0, -1], rtol=1e-9) else cap
        out, states = self.run(True, **one)
        self.cache, self.width = cache_of(out), ids.shape[1]
        return self.logits(states)

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        self.width += 1
        inputs = behind(self.model, torch.tensor([[token]]), torch.ones(1, self.width, dtype=torch.long))
        out, states = self.run(not self.plain, **inputs, **cached(self.model, self.cache))
        return out.logits[0, -1] if self.plain else self.logits(states)


class Fast(Talk):
    """A batch under the library's steering, which is told its positions where ``generate`` tells them."""

    def say(self, tokens: list[list[int]]) -> Tensor:
        new = torch.tensor(tokens)
        return super().say(new, **behind(self.model, new, torch.cat([self.mask, torch.ones_like(new)], 1)))


def the_same(tiny, family: str, variant: str, attach: Any = nullcontext, order: str = "behind", **options: Any) -> None:
    """A padded batch and its cached steps give what each sample gives slowly."""
    model, inputs = loaded(tiny, family, variant)
    given, visual = {"lam": LAM, **options}, bind(model).visual
    ones = singles(model, inputs)
    with attach(model) if order != "before" else vtprune.steer(model, **given):
        with vtprune.steer(model, **given) if order != "before" else attach(model):
            fast = Fast(model, inputs)
            got = [fast.read()[:, -1]]
            got += [fast.say([[row[i]] for row in ANSWER])[:, -1] for i in range(3)]
    with attach(model):
        for b, one in enumerate(ones):
            slow = Slow(variant if variant in BEHIND else family, model, visual, **options)
            want = [slow.read(one), *(slow.step(token) for token in ANSWER[b])]
            for a, w in zip(got, want, strict=True):
                torch.testing.assert_close(a[b], w, atol=3e-5, rtol=1e-4)


SOME = [("llava", "clip-llama"), ("qwen2-vl", "images"), ("gemma3", "sliding"), ("internvl", "qwen2")]
PRUNED = {
    "pyramiddrop": {"keep": 3},
    "fastv": {"keep": 3, "layer": 2},
    "divprune": {"keep": 3},  # behind the projector
    "flowcut": {"keep": 0.5},  # in the tower
    "gemfilter": {"keep": 3},  # reads layers ahead of their turn
    "promptdistill": {"keep": 3},
    "sparsevlm": {"keep": 3},  # merges, and puts merged rows elsewhere
    "vtw": {},
    "swiftkv": {"layer": 2},
    "adaskip": {"attention": (2,), "mlp": (3,), "ratio": 1.1},
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize(("family", "variant"), FAMILIES, ids=lambda x: x)
def test_every_family_is_what_the_equations_say(tiny, family, variant):
    the_same(tiny, family, variant)


@pytest.mark.parametrize(
    ("family", "variant", "options"),
    [
        ("llava", "clip-llama", {}),
        ("llava", "siglip-qwen2", {"final_norm": True, "window": (2, 6), "alpha": 1}),
        ("paligemma", "gemma2", {"lam": 1.5, "window": (3, 3), "alpha": 0.5}),  # logits are capped behind the blend
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_options_are_what_the_equations_say(tiny, family, variant, options):
    the_same(tiny, family, variant, **options)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("method", PRUNED)
@pytest.mark.parametrize(("family", "variant"), SOME, ids=lambda x: x)
def test_pruned_models_are_steered_by_what_is_left(tiny, family, variant, method, order):
    """Slowly: the same attachment, and the transcription's hooks in it."""

    def attach(model: Any) -> Any:
        return vtprune.attach(model, method, **PRUNED[method])

    try:
        attach(tiny(family, variant)[0]).remove()
    except UnsupportedError as e:
        pytest.skip(str(e))
    the_same(tiny, family, variant, attach, order)


@pytest.mark.parametrize("order", ["before", "behind"])
def test_prompts_whose_text_is_pruned_as_well(tiny, order):
    """Images stay images: without them the prompt is its text, which the attachment prunes in its turn."""
    the_same(tiny, "llava", "clip-llama", lambda m: vtprune.attach(m, "fastv", keep=0.5, per="prompt"), order)


def test_layers_that_are_run_ahead_count_once(tiny):
    """GemFilter asks an early layer before it starts anew; logits are taken from the layers in front of it."""

    def attach(model: Any) -> Any:
        return vtprune.attach(model, "gemfilter", keep=3)

    the_same(tiny, "llava", "clip-llama", attach, window=(1, 2))


# ------------------------------------------------------------------------------------------------------- the equations


def test_the_equations_row_by_row():
    """Norms are kept, zero turns nothing, half precision comes back as it was."""
    torch.manual_seed(0)
    x, v = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    x[0, 1], v[2] = 0, 0
    x[1, 2] = -3 * v[1]  # straight away from where it is turned to
    got = inject(x, v, 0.4)
    for b in range(2):
        for t in range(5):
            a, c = x[b, t].tolist(), v[b].tolist()
            na, nc = (sum(i * i for i in row) ** 0.5 for row in (a, c))
            if na == 0:
                assert got[b, t].abs().max() == 0
                continue
            away = max(0.0, -sum(i * j for i, j in zip(a, c, strict=True)) / na / nc)
            mixed = [i / na + 0.4 * (1 + away) * j / nc for i, j in zip(a, c, strict=True)]
            size = sum(i * i for i in mixed) ** 0.5
            want = torch.tensor([na * i / size for i in mixed], dtype=torch.float64)
            torch.testing.assert_close(got[b, t], want, atol=1e-12, rtol=1e-12)
    assert torch.equal(got[2], x[2])
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), atol=1e-12, rtol=1e-12)
    assert torch.isfinite(inject(-v[:, None], v, 0.5)).all()  # the two cancel: there is no direction left
    assert torch.equal(inject(-v[:1, None], v[:1], 0.5), -v[:1, None])
    half = torch.randn(3, 5, 8).to(torch.bfloat16)
    near = inject(half.float(), v.float(), 0.4)
    assert inject(half, v, 0.4).dtype is torch.bfloat16
    torch.testing.assert_close(inject(half, v, 0.4).float(), near, atol=0.02, rtol=0.02)


def test_blended_rows():
    logits, early = torch.randn(2, 3, 4), [torch.randn(2, 3, 4) for _ in range(3)]
    rows = torch.tensor([[True, False, True], [False, False, True]])
    got = blend(logits, early, 0.3, rows)
    for b in range(2):
        for t in range(3):
            want = 0.7 * logits[b, t] + 0.1 * (early[0][b, t] + early[1][b, t] + early[2][b, t])
            torch.testing.assert_close(got[b, t], want if rows[b, t] else logits[b, t])


# ------------------------------------------------------------------------------------------- what is not steered at all


@pytest.mark.parametrize("method", [None, "pyramiddrop"])
def test_nothing_is_the_identity(tiny, method):
    model, inputs = tiny("llava", "clip-llama")
    words = {"input_ids": torch.tensor([[9, 12, 14, 30]])}
    with torch.no_grad(), vtprune.attach(model, method, keep=3) if method else nullcontext():
        want = model(**inputs).logits, model(**words).logits
        told = model.generate(**inputs, max_new_tokens=4), model.generate(**words, max_new_tokens=4)
        with vtprune.steer(model, lam=0, alpha=0):
            assert torch.equal(model(**inputs).logits, want[0])
            assert torch.equal(model.generate(**inputs, max_new_tokens=4), told[0])
        with vtprune.steer(model, lam=0.5, alpha=0.5):
            assert torch.equal(model(**words).logits, want[1])  # there is no image
            assert torch.equal(model.generate(**words, max_new_tokens=4), told[1])
            assert not torch.equal(model(**inputs).logits, want[0])


def mixed(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The second sample is of text alone."""
    adapter, ids = bind(model), inputs["input_ids"].clone()
    ids[1][adapter.visual(ids[1])] = 21
    pixels = adapter.slice_(inputs, adapter.parts(inputs["input_ids"], inputs), 0)
    along = {k: v.clone() for k, v in inputs.items() if k in ALONG}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in along:
            along[name][1] = 0
    return {**along, "input_ids": ids, **pixels}


@pytest.mark.parametrize(("family", "variant"), SOME[:2], ids=lambda x: x)
def test_samples_of_text_alone_stay_what_they_are(tiny, family, variant):
    model, inputs = loaded(tiny, family, variant)
    batch = mixed(model, inputs)
    plain = Fast(model, batch)
    want = [plain.read()[1, -1], *(plain.say([[9], [12]])[1, -1] for _ in range(2))]
    slow = Slow(family, model, bind(model).visual)
    first = slow.read(singles(model, inputs)[0]), slow.step(9), slow.step(9)
    with vtprune.steer(model, lam=LAM):
        fast = Fast(model, batch)
        got = [fast.read()[:, -1], *(fast.say([[9], [12]])[:, -1] for _ in range(2))]
        for a, w, s in zip(got, want, first, strict=True):
            assert torch.equal(a[1], w)
            torch.testing.assert_close(a[0], s, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- ways to run


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
}
RULES = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [3, 4]}
TOLD = {"return_dict_in_generate": True, "output_scores": True}


def generated(model: Any, inputs: dict[str, Any], **ways: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(**inputs, **{**RULES, **TOLD, **ways})


def alike(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.scores, want.scores, strict=True):
        real = torch.isfinite(b)
        assert torch.equal(real, torch.isfinite(a))
        torch.testing.assert_close(a[real], b[real], atol=1e-5, rtol=1e-4, check_dtype=False)


def pruned(model: Any, how: str | None) -> Any:
    """An attachment; ``"text"``: one that prunes the text as well."""
    if how is None:
        return nullcontext()
    return (
        vtprune.attach(model, "fastv", keep=0.5, per="prompt") if how == "text" else vtprune.attach(model, how, keep=3)
    )


@pytest.mark.parametrize("method", [None, "pyramiddrop", "text"])
@pytest.mark.parametrize("way", WAYS)
def test_generate_with_and_without_a_cache(tiny, way, method):
    """Without, everything is read again for every token: the prompt stays the prompt, and so do its vectors."""
    model, inputs = loaded(tiny, "llava", "clip-llama")
    model.generation_config.disable_compile = True
    with pruned(model, method), vtprune.steer(model, lam=LAM):
        got = generated(model, inputs, **WAYS[way])
        ways = {k: v for k, v in WAYS[way].items() if k != "cache_implementation"}
        alike(got, generated(model, inputs, **ways, use_cache=False))


@pytest.mark.parametrize(("family", "variant"), SOME[:3], ids=lambda x: x)
def test_generate_says_what_the_equations_say(tiny, family, variant):
    model, inputs = loaded(tiny, family, variant)
    with vtprune.steer(model, lam=LAM):
        got = generated(model, inputs)
    for b, one in enumerate(singles(model, inputs)):
        slow = Slow(family, model, bind(model).visual)
        scores = slow.read(one)
        for token, told in zip(got.sequences[b, -5:].tolist(), got.scores, strict=True):
            real = torch.isfinite(told[b])
            torch.testing.assert_close(told[b][real], scores[real].float(), atol=1e-5, rtol=1e-4)
            scores = slow.step(token)


@pytest.mark.parametrize("method", [None, "pyramiddrop", "text"])
def test_answers_are_scored_with_the_vectors_they_were_generated_with(tiny, method):
    model, inputs = loaded(tiny, "llava", "clip-llama")
    with pruned(model, method), vtprune.steer(model, lam=LAM), torch.no_grad():
        told = generated(model, inputs)
        mask = F.pad(inputs["attention_mask"], (0, 5), value=1)
        logits = model(**{**inputs, "input_ids": told.sequences, "attention_mask": mask}).logits
        for i, scores in enumerate(told.scores):
            real = torch.isfinite(scores)
            torch.testing.assert_close(logits[:, i - 6][real].float(), scores[real], atol=1e-5, rtol=1e-4)


def test_rows_of_logits_and_the_ways_into_the_model(tiny):
    model, inputs = loaded(tiny, "llava", "clip-llama")
    early = (1, 4)  # in front of the cut and behind it
    with torch.no_grad(), vtprune.attach(model, "fastv", keep=3, layer=2), vtprune.steer(model, lam=LAM, window=early):
        whole = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, whole[:, -2:])
        at = torch.tensor([-5, -1])
        torch.testing.assert_close(model(**inputs, logits_to_keep=at).logits, whole[:, at])
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], whole)
        torch.testing.assert_close(model.forward(**inputs).logits, whole)
        steered = model.model(**inputs).last_hidden_state
        want = model(**inputs, output_hidden_states=True).hidden_states
        assert len(want) == 7
    with torch.no_grad(), vtprune.attach(model, "fastv", keep=3, layer=2):
        with vtprune.steer(model, lam=LAM, alpha=0):
            torch.testing.assert_close(model.lm_head(steered), model(**inputs).logits)
    gone = (steered == 0).all(-1) & inputs["attention_mask"].bool()
    assert gone.sum() == 26 and (whole[gone] == 0).all()  # dropped rows say nothing, as they did


def test_requests_do_not_mix_and_threads_neither(tiny):
    model, inputs = loaded(tiny, "llava", "clip-llama")
    ones = singles(model, inputs)
    with vtprune.steer(model, lam=LAM):

        def solo(one: dict[str, Any], row: list[int]) -> list[Tensor]:
            fast = Fast(model, one)
            return [fast.read(), *(fast.say([[token]]) for token in row)]

        want = [solo(one, row) for one, row in zip(ones, ANSWER, strict=True)]
        talks = [Fast(model, one) for one in ones]
        got = [[talk.read()] for talk in talks]
        for i in range(3):
            for talk, said, row in zip(talks, got, ANSWER, strict=True):
                said.append(talk.say([[row[i]]]))
        parallel: list[Any] = [None, None]

        def run(b: int) -> None:
            parallel[b] = [solo(ones[b], ANSWER[b]) for _ in range(4)]

        threads = [threading.Thread(target=run, args=(b,)) for b in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for b in range(2):
        for alone, said, *others in zip(want[b], got[b], *parallel[b], strict=True):
            assert torch.equal(alone, said) and all(torch.equal(alone, other) for other in others)
    assert not torch.allclose(want[0][-1], want[1][-1])


@pytest.mark.parametrize("method", [None, "pyramiddrop"])
def test_samples_of_a_cache_that_move_take_their_vectors_along(tiny, method):
    model, inputs = loaded(tiny, "llava", "clip-llama")
    with vtprune.attach(model, method, keep=3) if method else nullcontext(), vtprune.steer(model, lam=0.8):

        def moved(how: str, index: Any, order: list[int]) -> Tensor:
            fast = Fast(model, inputs)
            fast.read()
            getattr(fast.cache, how)(index)
            fast.ids, fast.mask = fast.ids[order], fast.mask[order]
            return fast.say([[9]] * len(order))

        straight = moved("reorder_cache", torch.tensor([0, 1]), [0, 1])
        assert not torch.allclose(straight[0], straight[1])
        for how, index, order in (
            ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
            ("batch_select_indices", torch.tensor([1]), [1]),
            ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
        ):
            torch.testing.assert_close(moved(how, index, order), straight[order])


def test_several_tokens_at_once_and_a_cache_that_is_used_again(tiny):
    model, inputs = loaded(tiny, "llava", "clip-llama")
    with vtprune.steer(model, lam=LAM):
        one, other = Fast(model, inputs), Fast(model, inputs)
        one.read(), other.read()
        steps = torch.cat([one.say([[9], [9]]), one.say([[23], [23]])], 1)
        torch.testing.assert_close(other.say([[9, 23], [9, 23]]), steps)
        one.cache.crop(-2)  # behind the prompt: the answer is another
        one.mask = inputs["attention_mask"]
        torch.testing.assert_close(one.say([[9], [9]]), steps[:, :1])


def test_gradients_see_the_vectors_as_constants(tiny):
    model, inputs = loaded(tiny, "llava", "clip-llama")
    one = singles(model, inputs)[0]
    slow = Slow("llava", model, bind(model).visual)
    slow.read(one)
    weight = model.model.language_model.layers[3].mlp.up_proj.weight
    (want,) = torch.autograd.grad(slow.logits(slow.run(True, **one)[1]).square().sum(), weight)
    with vtprune.steer(model, lam=LAM):
        (got,) = torch.autograd.grad(model(**one).logits[0, -1].square().sum(), weight)
    torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-6)


@pytest.mark.ci
def test_compiled_models_are_steered(tiny):
    model, inputs = tiny("llava", "clip-llama")
    quick = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = quick(**inputs).logits
        with vtprune.steer(quick, lam=LAM):
            want = model(**inputs).logits
            torch.testing.assert_close(quick(**inputs).logits, want)
            assert not torch.allclose(want, plain, atol=1e-2)
        torch.testing.assert_close(quick(**inputs).logits, plain)


# ------------------------------------------------------------------------------------------------- coming and going


def test_everything_is_as_it_was_in_any_order(tiny):
    model, inputs = tiny("llava", "clip-llama")
    before = snapshot(model)
    with torch.no_grad():
        dense = model(**inputs).logits
        with vtprune.attach(model, "fastv", keep=3, layer=2) as handle:
            pruned = model(**inputs).logits
        results = []
        for order in ("steer first", "attach first"):
            if order == "steer first":
                steering, handle = vtprune.steer(model), vtprune.attach(model, "fastv", keep=3, layer=2)
            else:
                handle, steering = vtprune.attach(model, "fastv", keep=3, layer=2), vtprune.steer(model)
            both = model(**inputs).logits
            kept = handle.report().visual_tokens[0], handle.report().effective_tokens
            handle.remove()
            alone = model(**inputs).logits
            steering.remove()
            steering.remove()
            assert snapshot(model) == before and torch.equal(model(**inputs).logits, dense)
            results.append((both, alone, kept))
            steering, handle = vtprune.steer(model), vtprune.attach(model, "fastv", keep=3, layer=2)
            steering.remove()
            assert torch.equal(model(**inputs).logits, pruned)
            handle.remove()
            assert snapshot(model) == before
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert results[0][2] == results[1][2] and results[0][2][1] < results[0][2][0]
        with pytest.raises(ZeroDivisionError), vtprune.steer(model):
            raise ZeroDivisionError
        assert snapshot(model) == before
        with vtprune.steer(model):
            steered = model(**inputs).logits
            with pytest.raises(VtpruneError):
                vtprune.attach(model, "fastv", keep=3, layer=99)
            assert torch.equal(model(**inputs).logits, steered) and not torch.equal(steered, dense)
        assert snapshot(model) == before and model not in live.steered


def test_a_conversation_goes_on_when_an_attachment_comes(tiny):
    """Its prompt was read dense, and stays so."""
    model, inputs = tiny("llava", "clip-llama")
    with vtprune.steer(model):
        one, other = Fast(model, inputs), Fast(model, inputs)
        one.read(), other.read()
        want = one.say([[9], [9]])
        with vtprune.attach(model, "fastv", keep=3, layer=2):
            torch.testing.assert_close(other.say([[9], [9]]), want)


def test_a_forward_that_breaks_off_leaves_nothing_behind(tiny):
    model, inputs = tiny("llava", "clip-llama")
    layer = model.model.language_model.layers[4]
    with torch.no_grad(), vtprune.steer(model) as steering:
        want = model(**inputs).logits
        hook = layer.register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        hook.remove()
        assert not steering._engine.entrance.stack
        assert torch.equal(model(**inputs).logits, want)


def test_the_model_keeps_what_it_knew_of_its_last_prompt(tiny):
    """Qwen-VL's positions behind a prompt hang on the model: those of the prompt without images must not stay there."""
    model, inputs = tiny("qwen2-vl", "images")
    with torch.no_grad():
        model(**inputs)
        want = model.base_model.rope_deltas.clone()
        model.base_model.rope_deltas = None
        with vtprune.steer(model):
            model(**inputs)
            assert torch.equal(model.base_model.rope_deltas, want)
            model.generate(**inputs, max_new_tokens=1)
            assert torch.equal(model.base_model.rope_deltas, want)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_options_out_of_range(tiny):
    model, _ = tiny("llava", "clip-llama")
    for options, words in (
        ({"lam": -0.1}, "lam=-0.1 is not a number from 0 to 10000"),
        ({"lam": 10**400}, "is not a number from 0 to 10000"),
        ({"lam": 1e39}, "lam=1e\\+39 is not a number from 0 to 10000"),
        ({"lam": float("nan")}, "lam=nan"),
        ({"lam": "0.1"}, "lam='0.1'"),
        ({"alpha": 1.1}, "alpha=1.1 is not a number from 0 to 1"),
        ({"alpha": True}, "alpha=True"),
        ({"window": (0, 3)}, "not within the layers 1 to 6"),
        ({"window": (4, 3)}, "not within the layers 1 to 6"),
        ({"window": (4, 7)}, "not within the layers 1 to 6"),
        ({"window": 3}, "not two numbers"),
        ({"final_norm": 1}, "final_norm=1"),
    ):
        with pytest.raises(VtpruneError, match=words.replace("(", r"\(")):
            vtprune.steer(model, **options)
    assert model not in live.steered


def test_models_that_are_not_steered(tiny):
    for family, variant, words in (("causal-lm", "llama", "reads no images"), ("hf-vit", "clip", "no language model")):
        with pytest.raises(UnsupportedError, match=words):
            vtprune.steer(tiny(family, variant)[0])
    model, _ = tiny("llava", "clip-llama")
    with vtprune.steer(model):
        with pytest.raises(VtpruneError, match="steered already"):
            vtprune.steer(model)
        with pytest.raises(UnsupportedError, match="shelve=True"):
            vtprune.attach(model, "fastv", keep=3, layer=2, shelve=True)
    with vtprune.attach(model, "fastv", keep=3, layer=2, shelve=True), pytest.raises(UnsupportedError, match="shelve"):
        vtprune.steer(model)
    other, _ = tiny("llava", "clip-llama")
    layer = other.model.language_model.layers[2]
    own, before = layer.forward, snapshot(other)
    layer.forward = lambda *a, **k: 2 * own(*a, **k)
    with pytest.raises(UnsupportedError, match="MLP of layer 2 gives is not what"):
        vtprune.steer(other)
    del layer.forward
    assert snapshot(other) == before
    vtprune.steer(other).remove()


def test_prompts_that_are_refused(tiny):
    model, inputs = tiny("llava", "clip-llama")
    ids = inputs["input_ids"]
    with torch.no_grad(), vtprune.steer(model):

        def refused(words: str, **more: Any) -> None:
            given = {k: v for k, v in {**inputs, **more}.items() if v is not None}
            with pytest.raises(UnsupportedError, match=words):
                model(**given)

        refused("gives no loss", labels=ids)
        model.train()
        refused("cannot be trained")
        model.eval()
        model.model.language_model.layers[3].train()
        refused("cannot be trained")
        model.eval()
        embeds = model.get_input_embeddings()(ids)
        refused("needs input_ids", input_ids=None, pixel_values=None, inputs_embeds=embeds)
        last = torch.cat([ids[:, 24:], ids[:, :24]], 1)
        assert last[1, -1] == 3
        refused("ends with an image token", input_ids=last, attention_mask=None)
        refused("2-D attention_mask", attention_mask=torch.zeros(2, 1, ids.shape[1], ids.shape[1]))
        places = torch.arange(ids.shape[1]).expand(2, -1) % 10
        refused("packed into one row", attention_mask=None, position_ids=places)
        with pytest.raises(UnsupportedError, match="called by itself"):
            model.model.language_model(inputs_embeds=embeds)
        with pytest.raises(UnsupportedError, match="prefill_chunk_size"):
            model.generate(**inputs, prefill_chunk_size=20, max_new_tokens=2)
        with pytest.raises(UnsupportedError, match="assistant"):
            model.generate(**inputs, prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_caches_that_are_refused(tiny):
    model, inputs = tiny("llava", "clip-llama")
    token = torch.tensor([[9], [9]])
    with torch.no_grad():
        foreign = cache_of(model(**inputs, use_cache=True))
        with vtprune.steer(model):
            cache = cache_of(model(**inputs, use_cache=True))
            for strange in (foreign, copy.deepcopy(cache)):
                with pytest.raises(UnsupportedError, match="not filled with this steering"):
                    model(input_ids=token, **cached(model, strange))
                with pytest.raises(UnsupportedError, match="not filled with this steering"):
                    model.generate(**inputs, max_new_tokens=1, **cached(model, strange))
            with pytest.raises(UnsupportedError, match="one row belongs to each"):
                model(input_ids=token.repeat(2, 1), **cached(model, cache))
            with pytest.raises(UnsupportedError, match="an image behind a prompt"):
                model(**{**inputs, "attention_mask": None}, **cached(model, cache))
            short = cache_of(model(**inputs, use_cache=True))
            short.crop(-10)
            with pytest.raises(UnsupportedError, match="cut back into its prompt"):
                model(input_ids=token, **cached(model, short))
            words = cache_of(model(input_ids=token, use_cache=True))
            model(input_ids=token, **cached(model, cache))
        with pytest.raises(UnsupportedError, match="steering that this cache's prompt was read with has been removed"):
            model(input_ids=token, **cached(model, cache))
        model(input_ids=token, **cached(model, words))  # nothing was steered in it


@pytest.mark.parametrize("part", ["layer", "mlp", "head"])
def test_parts_that_were_replaced_since_are_noticed(tiny, part):
    model, inputs = tiny("llava", "clip-llama")
    layers = model.model.language_model.layers
    with torch.no_grad(), vtprune.steer(model):
        if part == "layer":
            layers[4] = type(layers[4])(model.config.text_config, 4).eval()
        elif part == "mlp":
            layers[4].mlp = torch.nn.Linear(48, 48)
        else:
            model.lm_head = torch.nn.Linear(48, 64)
        with pytest.raises(UnsupportedError, match="replaced since"):
            model(**inputs)
