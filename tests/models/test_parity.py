"""Everything transformers' models and ``generate`` offer works attached as it does without, when nothing is dropped, or
is refused by our own error.

After the layout of transformers' own model and generation tests, written anew. ``PYTHONPATH=tests python
tests/models/test_parity.py`` prints the table: families x modes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moulds
import vtprune
from cases import mixes_pictures
from vtprune.core.types import VtpruneError

FAMILIES = {
    "llava": ("llava", "clip-llama"),
    "llava-next": ("llava-next", "clip-llama"),
    "llava-onevision": ("llava-onevision", "images"),
    "qwen2.5-vl": ("qwen2.5-vl", "images"),
    "qwen3-vl": ("qwen3-vl", "images"),
    "internvl": ("internvl", "qwen2"),
    "gemma3": ("gemma3", "sliding"),
    "paligemma": ("paligemma", "gemma"),
    "smolvlm": ("smolvlm", "smolvlm"),
    "mistral3": ("mistral3", "sliding"),
}
RECIPES = ("pyramiddrop", "fastv")
SLOW = ("compiled", "compiled-forward")
CORE = (
    *("greedy", "sample", "beam", "static", "quantised", "right-padding", "continuation", "inner-model"),
    *("forward-labels", "gradient-checkpointing", "embeddings"),
)
RULES: dict[str, Any] = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "suppress_tokens": list(range(8)),
}
Inputs = dict[str, Tensor]
Mode = Callable[[Any, Inputs], list[Tensor]]
MODES: dict[str, Mode] = {}


def mode(name: str) -> Callable[[Mode], Mode]:
    """Registers a way of using a model: it answers with the tensors that must be equal."""

    def wrap(function: Mode) -> Mode:
        MODES[name] = function
        return function

    return wrap


def _cache_name(model: Any) -> str:
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _generate(model: Any, inputs: Inputs, **ways: Any) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(**{**inputs, **RULES, "return_dict_in_generate": True, "output_logits": True, **ways})
    return [out.sequences, *out.logits]


for _name, _ways in {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "top-p": {"do_sample": True, "top_p": 0.8},
    "beam": {"num_beams": 3},
    "beam-all-returned": {"num_beams": 2, "num_return_sequences": 2},
    "beam-sample": {"num_beams": 2, "do_sample": True},
    "group-beam": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "several-answers": {"do_sample": True, "num_return_sequences": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static-beam": {"cache_implementation": "static", "disable_compile": True, "num_beams": 2},
    "no-cache": {"use_cache": False},
    "no-cache-beam": {"use_cache": False, "num_beams": 2},
    "no-cache-sample": {"use_cache": False, "do_sample": True},
    "repetition-penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "end-of-sequence": {"min_new_tokens": 1, "eos_token_id": list(range(8, 40))},
    "logits-to-keep": {"logits_to_keep": 1},
    "chunks": {"prefill_chunk_size": 16},
}.items():
    MODES[_name] = functools.partial(_generate, **_ways)


@mode("offloaded")
def _offloaded(model: Any, inputs: Inputs) -> list[Tensor]:
    with _inline_streams():
        return _generate(model, inputs, cache_implementation="offloaded")


@mode("quantised")
def _quantised(model: Any, inputs: Inputs) -> list[Tensor]:
    from transformers import QuantizedCache

    return _generate(
        model, inputs, **{_cache_name(model): QuantizedCache(backend="fp8", config=model.config.get_text_config())}
    )


@mode("compiled")
def _compiled(model: Any, inputs: Inputs) -> list[Tensor]:
    from transformers import CompileConfig

    torch._dynamo.reset()
    try:
        return _generate(
            model,
            inputs,
            cache_implementation="static",
            compile_config=CompileConfig(backend="eager", fullgraph=False, mode=None),
        )
    finally:
        torch._dynamo.reset()


@mode("compiled-forward")
def _compiled_forward(model: Any, inputs: Inputs) -> list[Tensor]:
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            return [torch.compile(model, backend="eager")(**inputs).logits]
    finally:
        torch._dynamo.reset()


@mode("everything-told")
def _told(model: Any, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(0)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            more = {
                "output_scores": True,
                "output_hidden_states": True,
                "output_attentions": True,
                "return_dict_in_generate": True,
            }
            out = model.generate(**inputs, **RULES, **more)
    finally:
        model.set_attn_implementation("sdpa")
    return [
        out.sequences,
        *out.scores,
        *(x for step in out.hidden_states for x in step),
        *(x for step in out.attentions for x in step),
    ]


@mode("forward")
def _forward(model: Any, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [model(**inputs).logits]


@mode("forward-tuple")
def _tuple(model: Any, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [model(**inputs, return_dict=False)[0]]


@mode("forward-hidden-states")
def _hidden(model: Any, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    return [out.logits, *out.hidden_states]


@mode("forward-logits-to-keep")
def _kept(model: Any, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [model(**inputs, logits_to_keep=n).logits for n in (1, 3, torch.tensor([2, 5]))]


@mode("forward-labels")
def _labels(model: Any, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        out = model(**inputs, labels=_answers(inputs))
    return [out.loss, out.logits]


@mode("eager")
def _eager(model: Any, inputs: Inputs) -> list[Tensor]:
    model.set_attn_implementation("eager")
    try:
        return _generate(model, inputs)
    finally:
        model.set_attn_implementation("sdpa")


@mode("single")
def _single(model: Any, inputs: Inputs) -> list[Tensor]:
    return _generate(model, _one(model, inputs, 0))


@mode("right-padding")
def _right(model: Any, inputs: Inputs) -> list[Tensor]:
    moved = dict(inputs)
    for b, real in enumerate(inputs["attention_mask"].bool()):
        for k, v in inputs.items():
            if k in ("input_ids", "attention_mask") or k.endswith("token_type_ids"):
                moved[k] = moved[k].clone()
                moved[k][b] = torch.cat([v[b][real], torch.zeros_like(v[b][~real])])
    with torch.no_grad():
        return [model(**moved).logits[moved["attention_mask"].bool()]]


@mode("text-only")
def _text(model: Any, inputs: Inputs) -> list[Tensor]:
    ids = torch.randint(8, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    return _generate(
        model,
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            **{k: torch.zeros_like(ids) for k in inputs if k == "token_type_ids"},
        },
    )


@mode("placeholders-without-pixels")
def _bare(model: Any, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits]


@mode("continuation")
def _continuation(model: Any, inputs: Inputs) -> list[Tensor]:
    """A prompt is read, and generation goes on from its cache, by hand and by ``generate``."""
    one, name = _one(model, inputs, 0), _cache_name(model)
    with torch.no_grad():
        out = model(**one, use_cache=True)
        new = torch.tensor([[9, 10]])
        mask = torch.cat([one["attention_mask"], torch.ones_like(new)], 1)
        more = model(input_ids=new, attention_mask=mask, **{name: getattr(out, name)}, use_cache=True)
    return [out.logits, more.logits]


@mode("continuation-by-generate")
def _turns(model: Any, inputs: Inputs) -> list[Tensor]:
    one, name = _one(model, inputs, 0), _cache_name(model)
    with torch.no_grad():
        first = model.generate(**one, **RULES, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[9, 10, 11]])], 1)
        kinds = {
            k: torch.nn.functional.pad(v, (0, ids.shape[1] - v.shape[1]))
            for k, v in one.items()
            if k.endswith("token_type_ids")
        }
        again = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **kinds, **{name: getattr(first, name)}, **RULES
        )
    return [first.sequences, again]


@mode("embeddings")
def _embeddings(model: Any, inputs: Inputs) -> list[Tensor]:
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    with torch.no_grad():
        return [model(**rest, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"])).logits]


@mode("embeddings-generate")
def _embedded(model: Any, inputs: Inputs) -> list[Tensor]:
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    return _generate(model, rest, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]).detach())


@mode("embeddings-text-only")
def _embedded_text(model: Any, inputs: Inputs) -> list[Tensor]:
    ids = torch.randint(8, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=torch.ones_like(ids)).logits]


@mode("encoded-ahead")
def _encoded(model: Any, inputs: Inputs) -> list[Tensor]:
    core = model.base_model
    given = {k: v for k, v in inputs.items() if k in inspect.signature(core.get_image_features).parameters}
    rest = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
    with torch.no_grad():
        return [model(**rest, mm_encoder_outputs={"image": core.get_image_features(**given, return_dict=True)}).logits]


@mode("inner-model")
def _inner(model: Any, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [model.base_model(**inputs).last_hidden_state]


@mode("assistant")
def _assistant(model: Any, inputs: Inputs) -> list[Tensor]:
    one = _one(model, inputs, 0)
    return _generate(model, one, assistant_model=_plain_copy(model))


@mode("prompt-lookup")
def _looked_up(model: Any, inputs: Inputs) -> list[Tensor]:
    return _generate(model, _one(model, inputs, 0), prompt_lookup_num_tokens=2)


@mode("training")
def _training(model: Any, inputs: Inputs, checkpointing: bool = False) -> list[Tensor]:
    model.train()
    try:
        if checkpointing:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
        out = model(**inputs, labels=_answers(inputs), use_cache=False)
        out.loss.backward()
        return [
            out.loss.detach(),
            *(p.grad.clone() for n, p in sorted(model.named_parameters()) if p.grad is not None and "layers." in n),
        ]
    finally:
        if checkpointing:
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        model.zero_grad()
        model.eval()


MODES["gradient-checkpointing"] = functools.partial(_training, checkpointing=True)


@mode("save-and-load")
def _saved(model: Any, inputs: Inputs) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [again(**inputs).logits]


@mode("state-dict")
def _state(model: Any, inputs: Inputs) -> list[Tensor]:
    return [v.double() for _, v in sorted(model.state_dict().items())] + [
        torch.tensor([hash(k) for k in sorted(model.state_dict())])
    ]


@mode("resized-embeddings")
def _resized(model: Any, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(0)
    model.resize_token_embeddings(72, mean_resizing=False)
    with torch.no_grad():
        return [model(**inputs).logits[..., :64]]


@mode("half")
def _half(model: Any, inputs: Inputs) -> list[Tensor]:
    model.to(torch.bfloat16)
    with torch.no_grad():
        return [
            model(**{k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}).logits.float()
        ]


@mode("deep-copy")
def _copied(model: Any, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [copy.deepcopy(model)(**inputs).logits]


@mode("autocast")
def _autocast(model: Any, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return [model(**inputs).logits.float()]


@mode("frozen-and-trained")
def _frozen(model: Any, inputs: Inputs) -> list[Tensor]:
    """Only the head learns."""
    for n, p in model.named_parameters():
        p.requires_grad_(n == "lm_head.weight")
    out = model(**inputs, labels=_answers(inputs))
    out.loss.backward()
    return [out.loss.detach(), model.get_output_embeddings().weight.grad]


# --------------------------------------------------------------------------------------------------------------------
# helpers


def _answers(inputs: Inputs) -> Tensor:
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return labels


def _one(model: Any, inputs: Inputs, b: int) -> Inputs:
    from vtprune.core.planning import bind

    adapter = bind(model)
    real = inputs["attention_mask"][b].bool()
    along = {k: v[b : b + 1, real] for k, v in inputs.items() if k in ("input_ids", "attention_mask", *adapter.follows)}
    return {**along, **adapter.slice_(inputs, adapter.parts(inputs["input_ids"], inputs), b)}


def _plain_copy(model: Any) -> Any:
    fresh = type(model)(copy.deepcopy(model.config)).eval()
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh


class _Stream(contextlib.nullcontext):
    """A stream that runs everything at once."""

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@contextlib.contextmanager
def _inline_streams() -> Iterator[None]:
    """transformers copies on an accelerator's streams; without one, in line."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.accelerator.is_available():
            patch.setattr(torch, "Stream", _Stream)
            patch.setattr(torch.cuda, "default_stream", _Stream)
        yield


def _fresh(family: str) -> tuple[Any, Inputs]:
    return moulds.tiny(*FAMILIES[family])


@functools.cache
def plain(family: str, name: str) -> list[Tensor] | str:
    """What the mode gives without us, or why it does not exist there."""
    model, inputs = _fresh(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return MODES[name](model, inputs)
        except Exception as e:  # transformers has no such mode here
            return f"{type(e).__name__}: {e}".splitlines()[0]


def outcome(family: str, name: str, recipe: str) -> tuple[str, str]:
    """``("equal" | "refused" | "absent" | "DIFFERENT" | "RAW", detail)``."""
    want = plain(family, name)
    if isinstance(want, str):
        return "absent", want
    model, inputs = _fresh(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with vtprune.attach(model, recipe, keep=1.0):
                got = MODES[name](model, inputs)
        except VtpruneError as e:
            return "refused", str(e)
        except Exception as e:
            return "RAW", f"{type(e).__name__}: {str(e).splitlines()[0][:150] if str(e) else ''}"
    if len(got) != len(want):
        return "DIFFERENT", f"{len(got)} tensors instead of {len(want)}"
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or a.isnan().any() != b.isnan().any():
            return "DIFFERENT", f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
        same = (a == b) | (a.isnan() & b.isnan())
        if a.numel() and not bool(same.all()):
            worst = max(
                worst,
                float(
                    (a.double() - b.double())[~same].abs().max() / b.double()[b.isfinite()].abs().max().clamp_min(1e-6)
                ),
            )
    limit = 2e-2 if name in ("half", "autocast") else 2e-5
    return ("equal", "") if worst <= limit else ("DIFFERENT", f"{worst:.1e} off")


# Refusals are as good as equal, but none may come unseen: which modes may refuse, and by what words.
MAY_REFUSE = {
    "prompt-lookup": "assisted decoding",
    "assistant": "assisted decoding",
    "chunks": "prefill_chunk_size",
    "embeddings": "input_ids",
    "embeddings-generate": "input_ids",
    "embeddings-text-only": "input_ids",
    "no-cache": "cache",
    "no-cache-beam": "cache",
    "no-cache-sample": "cache",
    "deep-copy": "cop",
    "placeholders-without-pixels": "",
    "compiled": "compile",
    "compiled-forward": "compile",
    "continuation-by-generate": "cache",
    "forward-tuple": "tuple",
}


QUICK = ("llava", "llava-next", "qwen2.5-vl", "gemma3", "smolvlm")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_what_passes_without_passes_with_pyramiddrop_at_full_budget(family):
    """One family in every mode, others in those that a family can do in its own way; the rest under the slow
    marker."""
    _check(family, "pyramiddrop", [m for m in MODES if m not in SLOW and (family == "llava" or m in CORE)])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_passes_without_passes_with_every_recipe(family, recipe):
    _check(family, recipe, list(MODES))


def test_a_mode_that_changes_is_seen(monkeypatch):
    right = vtprune.attach
    monkeypatch.setattr(vtprune, "attach", lambda model, recipe, keep: right(model, recipe, keep=0.2))
    assert [outcome("llava", m, "pyramiddrop")[0] for m in ("forward", "greedy", "training")] == ["DIFFERENT"] * 3


def _check(family: str, recipe: str, names: list[str]) -> None:
    bad = []
    for name in names:
        kind, detail = outcome(family, name, recipe)
        if kind == "refused" and "not whole images" in detail and mixes_pictures():
            continue
        if kind in ("DIFFERENT", "RAW") or (
            kind == "refused" and (name not in MAY_REFUSE or MAY_REFUSE[name] not in detail)
        ):
            bad.append(f"{name}: {kind} {detail}")
    assert not bad, "\n".join(bad)


def main() -> int:
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    only = sys.argv[1:] or list(FAMILIES)
    began, worst = time.time(), False
    total: Counter[str] = Counter()
    short = {"equal": ".", "refused": "r", "absent": "-", "DIFFERENT": "X", "RAW": "E"}
    notes = []
    print(
        f"{'':30}"
        + " ".join(f"{f[:9]:>9}" for f in only)
        + "   (. equal, r refused, - transformers has none, X different, E other error)"
    )
    for name in MODES:
        cells = []
        for family in only:
            marks = ""
            for recipe in RECIPES:
                kind, detail = outcome(family, name, recipe)
                total[kind] += 1
                worst |= kind in ("DIFFERENT", "RAW")
                marks += short[kind]
                if kind not in ("equal", "absent"):
                    notes.append(f"{name} {family} {recipe}: {kind} {detail}")
            cells.append(f"{marks:>9}")
        print(f"{name:30}" + " ".join(cells), flush=True)
    print(
        "\n".join(
            ["", *notes, "", f"{dict(total)} in {time.time() - began:.0f} s with {' and '.join(RECIPES)} at keep=1.0"]
        )
    )
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
