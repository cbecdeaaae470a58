"""DPVR-LF (arXiv 2606.09131): the facts that hold without trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor, nn
from vtprune.models.engine.host import cache_of, cached

import oracles as O
import vtprune

L = 7
SHAPES = [[4, 9], [7, 2, 5], [3, 12]]


def shaken(handle: Any, seed: int = 9) -> nn.ModuleList:
    """The side branch, moved away from every layer of the backbone."""
    module = handle.modules["dpvr-lf"]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1)
    return module


def run(lm: nn.Module, layer: nn.Module, x: Tensor, positions: list[int], mask: Tensor | None = None) -> Tensor:
    """One decoder layer over ``x`` ``[n, D]``; ``mask`` ``[n, n]`` bool replaces plain causality."""
    ids = torch.tensor([positions])
    seen = torch.ones(len(x), len(x), dtype=torch.bool).tril() if mask is None else mask
    return layer(
        x[None], attention_mask=seen[None, None], position_ids=ids, position_embeddings=lm.rotary_emb(x[None], ids)
    )[0]


@torch.no_grad()
def late_fusion(
    lm: nn.Module, x: Tensor, at: list[int], split: int, fusion: int, branch: nn.ModuleList
) -> tuple[Tensor, Tensor]:
    """The four phases, written out; final hidden states and the branch's output."""
    everything = list(range(len(x)))
    text = [i for i in everything if i not in at]
    for layer in lm.layers[:split]:
        x = run(lm, layer, x, everything)
    o, u = x[at], x[text]
    for layer in branch:
        o = run(lm, layer, o, at)
    for layer in lm.layers[split : L - fusion]:
        u = run(lm, layer, u, text)
    h = torch.zeros_like(x)
    h[at], h[text] = o, u
    for layer in lm.layers[L - fusion :]:
        h = run(lm, layer, h, everything)
    return lm.norm(h), o


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("split, fusion, branch_layers", [(3, 1, 1), (0, 1, 2), (2, 3, 1), (6, 1, 1)])
def test_equals_the_four_phases(text: str, split: int, fusion: int, branch_layers: int) -> None:
    """In a padded batch with one and two images; layers and cuts are reported as they ran."""
    model, inputs = B.llava(text=text, layers=L), B.prompts(SHAPES)
    x = B.embeddings(model, inputs)
    with vtprune.attach(model, "dpvr-lf", split=split, fusion=fusion, branch_layers=branch_layers) as handle:
        branch = shaken(handle)
        hidden, report = B.final(model, inputs), handle.report()
    assert len(branch) == branch_layers
    for b, n in enumerate([36, 72, 36]):
        at = B.visual_positions(inputs, b).tolist()
        B.close(hidden[b], late_fusion(model.model.language_model, x[b], at, split, fusion, branch)[0])
        assert report.layer_tokens[b] == [n] * split + [0] * (L - split - fusion) + [n] * fusion
    assert [s.site for s in report.stages] == [f"llm.{split}", f"llm.{L - fusion}"]


def test_equals_a_dense_stack_whose_text_cannot_see_the_image() -> None:
    """Fact 3: forbid text rows the visual columns in layers s .. L-2, leave visual rows free, then replace them by the
    branch's output."""
    model, inputs = B.llava(text="qwen2", layers=L), B.prompts([[4, 9]])
    lm, (x,), at = model.model.language_model, B.embeddings(model, inputs), B.visual_positions(inputs, 0)
    with vtprune.attach(model, "dpvr-lf", split=3) as handle:
        branch = shaken(handle)
        (hidden,) = B.final(model, inputs)
    n = len(x)
    visual = torch.zeros(n, dtype=torch.bool)
    visual[at] = True
    blind = torch.ones(n, n, dtype=torch.bool).tril() & ~(visual[None] & ~visual[:, None])
    _, o = late_fusion(lm, x, at.tolist(), 3, 1, branch)
    with torch.no_grad():
        for i, layer in enumerate(lm.layers):
            if i == L - 1:
                x = torch.where(visual[:, None], torch.zeros_like(x).index_copy(0, at, o), x)
            x = run(lm, layer, x, list(range(n)), blind if 3 <= i < L - 1 else None)
        B.close(hidden, lm.norm(x))


def layer_outputs(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda m, a, y: seen.append(y[0] if isinstance(y, tuple) else y))
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


def test_text_before_the_image_and_layers_before_the_split_are_untouched() -> None:
    """Facts 1 and 2, and a prompt without an image is the dense model to the bit."""
    model, inputs = B.llava(layers=L), B.prompts([[9, 4], [9, 4]])
    words = {"input_ids": torch.tensor([[5, 9, 33, 12]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    dense, logits = layer_outputs(model, inputs)
    with torch.no_grad():
        alone = model(**words).logits
    with vtprune.attach(model, "dpvr-lf", split=3) as handle:
        shaken(handle)
        routed, changed = layer_outputs(model, inputs)
        with torch.no_grad():
            assert torch.equal(model(**words).logits, alone)
    for a, b in zip(dense[:3], routed[:3], strict=True):
        assert torch.equal(a, b)
    assert routed[3].shape[1] == 13 and routed[-1].shape == dense[-1].shape
    B.close(changed[:, :9], logits[:, :9], 1e-12)
    assert float((changed[:, 9:] - logits[:, 9:]).abs().max()) > 1e-3


@pytest.mark.parametrize("split, fusion", [(L - 1, 1), (3, L - 3)])
def test_identity_branch_without_text_only_layers_is_dense(split: int, fusion: int) -> None:
    """Fact 4."""
    model, inputs = B.llava(text="mistral", layers=L), B.prompts(SHAPES)
    dense = B.final(model, inputs)
    with vtprune.attach(model, "dpvr-lf", split=split, fusion=fusion, init="identity"):
        for a, b in zip(B.final(model, inputs), dense, strict=True):
            B.close(a, b, 1e-12)
    with vtprune.attach(model, "dpvr-lf", split=split, fusion=fusion, init="copy"):
        assert float((B.final(model, inputs)[0] - dense[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_persistent_context_resets_the_visual_rows(text: str) -> None:
    """pc: at the input of every deep layer the visual rows are the branch's output."""
    model, inputs = B.llava(text=text, layers=L), B.prompts(SHAPES)
    lm, x = model.model.language_model, B.embeddings(model, inputs)
    with vtprune.attach(model, "dpvr-lf", split=3, variant="pc") as handle:
        branch = shaken(handle)
        hidden, report = B.final(model, inputs), handle.report()
    for b in range(3):
        h, at = x[b], B.visual_positions(inputs, b)
        everything = list(range(len(h)))
        with torch.no_grad():
            for i, layer in enumerate(lm.layers):
                if i == 3:
                    o = h[at]
                    for extra in branch:
                        o = run(lm, extra, o, at.tolist())
                if i >= 3:
                    h = h.index_copy(0, at, o)
                h = run(lm, layer, h, everything)
            rows = [i for i in everything if i not in at.tolist()]
            B.close(hidden[b][rows], lm.norm(h)[rows])
        assert report.layer_tokens[b] == [len(at)] * L


KEYS_ONLY = [
    ({"split": 3, "variant": "pc"}, {"split": 3, "variant": "kv"}),
    ({"split": 3}, {"split": 3, "fusion_rows": "keys"}),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("full, keys", [*KEYS_ONLY, ({"split": 0, "variant": "pc"}, {"split": 0, "variant": "kv"})])
@pytest.mark.parametrize("shapes", [[*SHAPES, [11]], [[4, 9]]])
@pytest.mark.parametrize(
    "text, attention, left", [("llama", "sdpa", True), ("mistral", "eager", False), ("qwen2", "sdpa", False)]
)
def test_keys_and_values_alone_give_the_same_text(
    shapes: list[list[int]], text: str, attention: str, left: bool, full: dict[str, Any], keys: dict[str, Any]
) -> None:
    """Facts 5 and 9: kv writes what pc writes, and late fusion may skip the visual rows of its last layer; text rows
    and gradients agree, in a padded batch and for one prompt alone, for which transformers makes no mask."""
    model, inputs = B.llava(text=text, layers=L), B.prompts(shapes, left=left)
    model.set_attn_implementation(attention)
    limit = 3e-6 if attention == "eager" else 1e-9  # transformers' eager softmax works in float32
    hidden, grads = [], []
    for options in (full, keys):
        with vtprune.attach(model, "dpvr-lf", **options) as handle:
            shaken(handle)
            hidden.append(B.final(model, inputs))
            report = handle.report()
            labels = inputs["input_ids"].masked_fill(
                (inputs["input_ids"] == B.IMAGE) | ~inputs["attention_mask"].bool(), -100
            )
            labels[:, :-3] = -100
            loss = model(**inputs, labels=labels).loss
            grads.append(torch.autograd.grad(loss, list(handle.modules["dpvr-lf"].parameters())))
    for b in range(len(shapes)):
        at = inputs["input_ids"][b][inputs["attention_mask"][b].bool()] == B.IMAGE
        B.close(hidden[1][b][~at], hidden[0][b][~at], limit)
        assert not hidden[1][b][at].any()  # no visual row leaves the last layer
    for a, b in zip(grads[1], grads[0], strict=True):
        B.close(a, b, limit)
    start = L - 1 if "fusion_rows" in keys else keys["split"]
    assert report.layer_tokens[0] == [36] * keys["split"] + [0] * (start - keys["split"]) + [36] * (L - start)
    assert [(s.site, s.tokens_out[0]) for s in report.stages] == [(f"llm.{keys['split']}", 0), (f"llm.{start}", 36)]


def gradients(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> list[Tensor | None]:
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    with vtprune.attach(model, "dpvr-lf", split=3, **options) as handle:
        loss = model(**inputs, labels=labels).loss
        return list(torch.autograd.grad(loss, list(handle.modules["dpvr-lf"].parameters()), allow_unused=True))


def test_only_a_fusion_layer_lets_the_branch_learn() -> None:
    """Fact 6: without fusion no gradient reaches the branch, with one layer every weight of it gets some."""
    model, inputs = B.llava(text="qwen2", layers=L), B.prompts([[4, 9], [2, 7]])
    assert all(g is None or not g.any() for g in gradients(model, inputs, fusion=0))
    for options in ({"fusion": 1}, {"fusion": 2}, {"variant": "pc"}):
        assert all(g is not None and bool(g.any()) for g in gradients(model, inputs, **options))


def test_the_branch_belongs_to_the_handle() -> None:
    """No parameter is shared with the model, whose own names stay as they were; a start can be chosen, and the random
    one is reproducible."""
    model = B.llava(layers=L)
    names = list(model.state_dict())
    layer = model.model.language_model.layers[3].state_dict()
    first: dict[str, Tensor] = {}
    for init in ("copy", "identity", "random", "random"):
        with vtprune.attach(model, "dpvr-lf", split=3, init=init) as handle:
            module = handle.modules["dpvr-lf"]
            assert list(model.state_dict()) == names
            assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in model.parameters()}
            state = module[0].state_dict()
            zero = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            if init != "random":
                assert all(
                    not v.any() if init == "identity" and k in zero else torch.equal(v, layer[k])
                    for k, v in state.items()
                )
            else:
                assert not torch.equal(state[zero[0]], layer[zero[0]])
                assert not first or all(torch.equal(v, first[k]) for k, v in state.items())
                first = {k: v.clone() for k, v in state.items()}


def test_branch_has_the_published_size() -> None:
    """Fact 8: 202,383,360 parameters beside LLaVA-1.5-7B (4 d^2 + 3 d f + 2 d), and FLOPs are s c(T) + c(T_img) + (L -
    s - K) c(T_txt) + K c(T)."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from vtprune.models.llava import Llava

    with torch.device("meta"):
        adapter = Llava(LlavaForConditionalGeneration(LlavaConfig()))
        assert sum(p.numel() for p in adapter.branch(18).parameters()) == 202_383_360
    model, inputs = B.llava(layers=L), B.prompts([[4, 9]])
    d, f = 48, 80

    def c(n: int) -> int:
        return 8 * n * d * d + 4 * n * n * d + 6 * n * d * f

    with vtprune.attach(model, "dpvr-lf", split=3, fusion=2) as handle:
        B.final(model, inputs)
        report = handle.report()
    assert report.flops - report.dense_flops == 3 * c(49) + c(36) + 2 * c(13) + 2 * c(49) - 7 * c(49)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fusion": 2},
        {"fusion": 0},
        {"variant": "pc"},
        {"variant": "kv"},
        {"positions": "compact"},
        {"fusion_rows": "keys", "positions": "compact"},
        {"variant": "kv", "positions": "compact"},
        {"variant": "kv", "split": 0},
    ],
)
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_decoding_equals_recomputation(text: str, options: dict[str, Any]) -> None:
    """Fact 7: caches are T, T_txt, T long, and each cached step equals reading the grown prompt anew."""
    model, inputs = B.llava(text=text, layers=L), B.prompts([[4, 9], [2, 5]])
    ids, mask, position = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    fusion = options.get("fusion", 1)
    split = options.get("split", 3)
    with vtprune.attach(model, "dpvr-lf", **{"split": 3, **options}) as handle, torch.no_grad():
        shaken(handle)
        out = model(**inputs, use_cache=True)
        cache = cache_of(out)
        for step in range(3):
            token = torch.tensor([[20 + step], [50 - step]])
            ids, mask, position = (
                torch.cat([ids, token], 1),
                torch.cat([mask, torch.ones_like(token)], 1),
                torch.cat([position, position[:, -1:] + 1], 1),
            )
            out = model(input_ids=token, attention_mask=mask, position_ids=position[:, -1:], **cached(model, cache))
            anew = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position,
                pixel_values=inputs["pixel_values"],
                use_cache=False,
            )
            B.close(out.logits[:, -1], anew.logits[:, -1])
            long, short = 49 + step + 1, 13 + step + 1
            lengths = (
                [long] * split + [long if "variant" in options else short] * (L - split - fusion) + [long] * fusion
            )
            assert [cache.get_seq_length(i) for i in range(L)] == lengths


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("variant", ["lf", "pc", "kv"])
def test_a_padded_batch_equals_its_samples(variant: str, left: bool) -> None:
    """Fact 10, with a prompt that has no image among them."""
    shapes = [*SHAPES, [11]]
    model, inputs = B.llava(text="mistral", layers=L), B.prompts(shapes, left=left)
    with vtprune.attach(model, "dpvr-lf", split=3, variant=variant) as handle:
        shaken(handle)
        together = B.final(model, inputs)
        image = 0
        for b, shape in enumerate(shapes):
            m = inputs["attention_mask"][b].bool()
            one = {k: inputs[k][b][m][None] for k in ("input_ids", "attention_mask", "position_ids")}
            if len(shape) > 1:
                one["pixel_values"] = inputs["pixel_values"][image : image + len(shape) - 1]
                image += len(shape) - 1
            (alone,) = B.final(model, one)
            text = one["input_ids"][0] != B.IMAGE
            B.close(together[b][text], alone[text])


def test_behind_a_vision_stage_the_survivors_come_back() -> None:
    """Tokens that the tower dropped stay dropped: the report and the branch know the survivors only."""
    stages = (vtprune.Stage(method="flowcut", keep=7), vtprune.Stage(method="dpvr-lf", options={"split": 3}))
    model, inputs = B.llava(layers=L), B.prompts([[4, 9]])
    with vtprune.attach(model, vtprune.Recipe(name="both", stages=stages)) as handle:
        branch = shaken(handle)
        (hidden,), report = B.final(model, inputs), handle.report()
    (x,), at = B.embeddings(model, inputs), B.visual_positions(inputs, 0)
    kept = next(s for s in reversed(report.stages) if s.method == "flowcut").kept[0]
    back = report.stages[-1]
    assert back.tokens_out == [7] and back.kept[0].tolist() == kept.tolist()
    assert report.layer_tokens == [[7] * 3 + [0] * 3 + [7]]
    want = O.flowcut_oracle(model.model.vision_tower, inputs["pixel_values"], 7, 2)
    with torch.no_grad():
        x[at[kept]] = model.model.multi_modal_projector(want["hidden"][0, 1:])
    rows = sorted({*range(len(x))} - {*at.tolist()} | {*at[kept].tolist()})
    compact = [rows.index(i) for i in at[kept].tolist()]
    lm, h = model.model.language_model, x[rows]
    with torch.no_grad():
        for layer in lm.layers[:3]:
            h = run(lm, layer, h, rows)
        o, u = h[compact], h[[i for i in range(len(rows)) if i not in compact]]
        for layer in branch:
            o = run(lm, layer, o, at[kept].tolist())
        for layer in lm.layers[3:6]:
            u = run(lm, layer, u, [r for r in rows if r not in at.tolist()])
        h = torch.zeros_like(h)
        h[compact] = o
        h[[i for i in range(len(rows)) if i not in compact]] = u
        B.close(hidden[rows], lm.norm(run(lm, lm.layers[6], h, rows)))


def test_trained_weights_load(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, inputs = B.llava(layers=L), B.prompts([[4, 9]])
    with vtprune.attach(model, "dpvr-lf", split=3) as handle:
        module = shaken(handle)
        want = B.final(model, inputs)[0]
        save_file(module.state_dict(), tmp_path / "branch.safetensors")
    with vtprune.attach(model, "dpvr-lf", split=3, weights=str(tmp_path / "branch.safetensors")):
        assert torch.equal(B.final(model, inputs)[0], want)
    save_file(module.state_dict(), tmp_path / "told.safetensors", metadata={"split": "4"})
    (tmp_path / "words.safetensors").write_text("hello, these are words")
    save_file(module.state_dict(), tmp_path / "odd.safetensors", metadata={"split": "three"})
    broken = {k: v.clone() for k, v in module.state_dict().items()}
    next(iter(broken.values())).view(-1)[0] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "branch.safetensors").read_bytes()[:-100])
    reasons = {
        "told": "trained for split=4",
        "words": "not a safetensors file",
        "odd": "trained for split=three",
        "nan": "no finite numbers",
    }
    for name, reason in {**reasons, "cut": "not a safetensors file"}.items():
        with pytest.raises(vtprune.VtpruneError, match=reason):
            vtprune.attach(model, "dpvr-lf", split=3, weights=str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(vtprune.VtpruneError, match="no such file"):
        vtprune.attach(model, "dpvr-lf", split=3, weights=str(tmp_path / "other.safetensors"))


def test_default_split_and_impossible_ones() -> None:
    from vtprune.core.types import Geometry
    from vtprune.methods.base import make

    geometry = Geometry(
        "llava", "clip", 576, (24, 24), 1, 23, 24, 32, {"llm": frozenset({"query_attention", "layers"})}
    )
    assert [c.site for c in make("dpvr-lf", {}).plan(geometry, None)] == ["llm.18", "llm.31"]
    for options in (
        {"split": 6, "fusion": 2},
        {"split": 7},
        {"branch_layers": 0},
        {"fusion": -1},
        {"init": "zeros"},
        {"fusion": 2, "fusion_rows": "keys"},
    ):
        with pytest.raises(vtprune.VtpruneError):
            vtprune.attach(B.llava(layers=L), "dpvr-lf", **options)
