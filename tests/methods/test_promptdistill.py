"""PromptDistill against a slow transcription, one stage and several."""

from __future__ import annotations

import pytest
import torch
from vtprune.models.engine.host import cached
from vtprune.models.engine.whole import HEAD

import vtprune
from prompts import best, heads, inputs_of, llama, smoothed
from vtprune.check.case import Case
from vtprune.core.planning import bind, load_recipe


def chosen(model, ids, layer: int, keep: int, pool: int) -> list[int]:
    """One stage for one whole prompt ``[T]``: the places that go on, the first four and the last among them."""
    n, d = len(ids), model.config.hidden_size // model.config.num_attention_heads
    queries, keys = heads(model, inputs_of(model, ids, layer), list(range(n)), layer)
    products = [[float(q[-1] @ k[j]) / d**0.5 for j in range(n)] for q, k in zip(queries, keys, strict=True)]
    score = [sum(p[j] for p in products) / len(products) for j in range(n)]
    score[-1] = 0.0
    return sorted([*range(HEAD), *best(smoothed(score, pool), list(range(HEAD, n - 1)), keep), n - 1])


@pytest.mark.parametrize(("layer", "keep", "pool"), [(2, 9, 5), (0, 5, 5), (4, 12, 1)])
def test_what_goes_on(layer, keep, pool):
    model, prompts = llama(samples=2)
    ids = torch.cat([prompts, torch.zeros(2, 7, dtype=torch.long)], 1)
    ids[1] = ids[1].roll(7)
    want = [chosen(model, p, layer, keep, pool) for p in prompts]
    with vtprune.attach(model, "promptdistill", keep=keep, layers=(layer,), pool=pool) as handle, torch.no_grad():
        model(input_ids=ids, attention_mask=(ids != 0).long())
        report = handle.report()
    assert [[*range(HEAD), *(k + HEAD).tolist(), 39] for k in report.stages[0].kept] == want
    assert report.layer_tokens[0] == [35] * (layer + 1) + [keep] * (5 - layer)


def test_a_second_stage_scores_what_is_left():
    """Pooling and products are over the shortened prompt, at its original places."""
    model, prompts = llama()
    ids = prompts[0]
    first = chosen(model, ids, 1, 15, 5)
    states: list[torch.Tensor] = []
    with vtprune.attach(model, "promptdistill", layers=(1, 3), counts=(15, 6)) as handle, torch.no_grad():
        hook = model.model.layers[3].register_forward_pre_hook(lambda m, a: states.append(a[0][0]))
        model(input_ids=prompts)
        hook.remove()
        report = handle.report()
    assert [*range(HEAD), *(report.stages[0].kept[0] + HEAD).tolist(), 39] == first
    queries, keys = heads(model, states[0], first, 3)
    d = model.config.hidden_size // model.config.num_attention_heads
    score = [
        sum(float(q[-1] @ k[j]) for q, k in zip(queries, keys, strict=True)) / len(queries) / d**0.5
        for j in range(len(first))
    ]
    score[-1] = 0.0
    inner = list(range(HEAD, len(first) - 1))
    want = [first[i] for i in best(smoothed(score, 5), inner, 6)]
    assert (report.stages[1].kept[0] + HEAD).tolist() == want


def test_options():
    model, _ = llama()
    for options, why in (
        ({"layers": (5,)}, "behind the last layer"),
        ({"pool": 2}, "must be odd"),
        ({"layers": (1, 3), "counts": (4,)}, "one for each of"),
        ({"layers": (1, 3), "counts": (4, 8)}, "falling numbers"),
        ({"layers": (3, 1)}, "must ascend"),
    ):
        with pytest.raises(vtprune.VtpruneError, match=why):
            vtprune.attach(model, "promptdistill", **options)


@pytest.mark.parametrize(
    ("layers", "counts", "truncate"), [((2,), (9,), 1), ((1, 3), (15, 6), 1), ((1, 3), (15, 6), -1)]
)
def test_truncated_caches(layers, counts, truncate):
    """Decoding equals the stock model under masks: in the prefill each layer sees what the stage before it left, behind
    it a truncated one only what the next stage sent on."""
    model, prompts = llama(samples=2)
    ids = torch.cat([prompts, torch.zeros(2, 7, dtype=torch.long)], 1)
    ids[0] = ids[0].roll(7)
    ids[1, :47] = torch.cat([torch.zeros(12, dtype=torch.long), prompts[1, :35]])
    mask = (ids != 0).long()
    how = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options = {"layers": layers, "counts": counts, "truncate": truncate}
    with vtprune.attach(model, "promptdistill", **options) as handle, torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, **how)
        report, cache = handle.report(), out.cache if hasattr(out, "cache") else out.past_key_values
    real = mask.sum(1).tolist()

    def columns(b: int, stage: int) -> list[int]:
        """Those of sample b behind so many stages."""
        every = mask[b].nonzero()[:, 0].tolist()
        if stage == 0:
            return every
        inner = every[HEAD:-1]
        return [*every[:HEAD], *(inner[i] for i in report.stages[stage - 1].kept[b].tolist()), every[-1]]

    short = len(layers) if truncate < 0 else truncate
    read = [sum(i > layer for layer in layers) for i in range(6)]  # stages in front of each layer
    hold = [max(r, min(r + 1, short)) for r in read]  # those by which its cache has been shortened
    for i in range(6):
        assert cache.get_seq_length(i) == max(len(columns(b, hold[i])) for b in range(2)) + 4
    want = stepwise(model, ids, mask, columns, read, hold, out.sequences)
    torch.testing.assert_close(
        torch.stack(out.logits, 1).double(), want, rtol=1e-5, atol=1e-6
    )  # logits come in float32
    kept = sum(len(columns(0, h)) for h in hold) / (6 * real[0])
    assert report.kv_bytes / report.dense_kv_bytes == pytest.approx(
        sum(len(columns(b, h)) for b in range(2) for h in hold) / (6 * sum(real))
    )
    assert kept < 1


def stepwise(model, ids, mask, columns, read, hold, sequences):
    """Logits of every new token: the whole sequence anew each time, layer by layer under one mask, whose prompt rows
    see what the layer read, and whose later rows what its cache holds."""
    b, t = ids.shape
    new = sequences.shape[1] - t
    places = torch.cat([mask.cumsum(1) - 1, mask.sum(1, keepdim=True) + torch.arange(new)], 1).clamp_min(0)
    out = []
    for step in range(new):
        n = t + step
        hidden: list = []

        def under(i: int, n: int = n) -> torch.Tensor:
            seen = torch.zeros(b, n, n, dtype=torch.bool)
            for s in range(b):
                for row in range(n):
                    alive = columns(s, read[i] if row < t else hold[i])
                    for column in [*alive, *range(t, n)]:
                        seen[s, row, column] = column <= row
                    seen[s, row, row] = True
            return torch.zeros(b, 1, n, n, dtype=torch.float64).masked_fill(
                ~seen[:, None], torch.finfo(torch.float64).min
            )

        hooks = []
        for i, layer in enumerate(model.model.layers):
            made = under(i)
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda m, a, k, made=made: (a, {**k, "attention_mask": made}), with_kwargs=True
                )
            )
        with torch.no_grad():
            hidden.append(model(input_ids=sequences[:, :n], position_ids=places[:, :n], use_cache=False).logits[:, -1])
        for hook in hooks:
            hook.remove()
        out += hidden
    return torch.stack(out, 1)


def test_what_cannot_be_truncated():
    from transformers import StaticCache
    from vtprune.models.base import ADAPTERS

    model, prompts = llama()
    with pytest.raises(vtprune.VtpruneError, match="there are 1 stages"):
        vtprune.attach(model, "promptdistill", truncate=2)
    with vtprune.attach(model, "promptdistill", layers=(2,), keep=9, truncate=1):
        with pytest.raises(vtprune.UnsupportedError, match="use_cache=True"):
            model.generate(prompts, max_new_tokens=2, use_cache=False)
        cache = StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(vtprune.UnsupportedError, match="evicted from a Static"):
            model(input_ids=prompts, **cached(model, cache))
    sliding, _ = ADAPTERS.get("causal-lm").tiny["gemma3"]()
    with pytest.raises(vtprune.UnsupportedError, match="nothing can be evicted"):
        vtprune.attach(sliding, "promptdistill", layers=(2,), truncate=1)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(("layers", "truncate"), [((2,), 1), ((1, 3), 1), ((1, 3), -1)])
@pytest.mark.parametrize(("family", "variant"), [("llava", "siglip-qwen2"), ("causal-lm", "llama")])
def test_answers_to_unequal_prompts_behind_truncated_caches(tiny, family, variant, layers, truncate, positions):
    """A padded batch answers as its prompts do one by one, and both as the dense model does, token by token: in front
    of a truncating stage answers see what it sent on, at the positions at which that was read."""
    model, inputs = tiny(family, variant)
    case = Case(model, load_recipe("promptdistill").override(keep=5, layers=layers, truncate=truncate), inputs, {})
    told = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with vtprune.attach(model, case.recipe, positions=positions) as handle:
        every = model.generate(**inputs, **told, output_logits=True, return_dict_in_generate=True)
        report = handle.report()
        singles = [
            model.generate(**one, **told, output_logits=True, return_dict_in_generate=True) for one in case.samples()
        ]
    for b, one in enumerate(singles):
        assert torch.equal(one.sequences[0, -4:], every.sequences[b, -4:])
        for alone, together in zip(one.logits, every.logits, strict=True):
            torch.testing.assert_close(alone[0], together[b], rtol=1e-3, atol=1e-4)
        ids = one.sequences[:, :-1]
        given = {**case.samples()[b], "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        want = dense(model, given, ids.shape[1] - 3, [s.kept[b] for s in report.stages], layers, truncate, positions)
        for step, row in enumerate(want[-4:]):
            torch.testing.assert_close(one.logits[step][0], row, rtol=1e-3, atol=1e-4)


def dense(model, inputs, n, kept, layers, truncate, positions):
    """Logits ``[T, V]`` of the whole sequence under masks and positions written out, layer by layer; the prompt are its
    first ``n`` tokens."""
    adapter, t = bind(model), inputs["input_ids"].shape[1]
    visual = torch.nn.functional.pad(adapter.prunable({"input_ids": inputs["input_ids"][:, :n]})[0], (0, t - n))
    columns, hooks = visual.nonzero()[:, 0], []
    gone = [visual.new_zeros(t)]  # behind no stage, behind the first, ...
    for k in kept:
        gone.append(visual.index_fill(0, columns[k], False))
    short = len(layers) if truncate < 0 else truncate
    for i, layer in enumerate(adapter.decoder_layers()):
        passed = sum(at < i for at in layers)  # a stage at layer l acts behind it
        read, kept_back = gone[passed], gone[passed + 1] if passed < short else gone[passed]
        seen = torch.ones(t, t, dtype=torch.bool).tril()
        for row in range(t):
            seen[row] &= ~(read if row < n else kept_back)
        seen |= torch.eye(t, dtype=torch.bool)
        ids = torch.arange(t)[None]
        if positions == "compact" and bool(read.any()):
            ids = ((~read).cumsum(0) - 1).clamp_min(0)[None]

        def enter(module, args, kwargs, seen=seen, ids=ids):
            mask = torch.zeros(1, 1, t, t).masked_fill(~seen, torch.finfo(torch.float32).min)
            tables = adapter.rotary(args[0], ids, "full_attention")
            return args, {**kwargs, "attention_mask": mask, "position_ids": ids, "position_embeddings": tables}

        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
