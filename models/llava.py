"""Hugging Face LLaVA-1.5: ``LlavaForConditionalGeneration`` with a CLIP, SigLIP or DINOv2 tower and a Llama, Mistral or Qwen2 language model."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ledger import UndoLedger
from ..types import Geometry, UnsupportedError
from . import _hf_vit
from ._cost import Shapes
from ._decoder import Decoder, DecoderEngine, Request, sentinel
from ._tower import Run, TowerEngine
from .base import ADAPTERS, AdapterInfo, PlannedCut

TEXT = ("LlamaModel", "MistralModel", "Qwen2Model")


class Llava:
    """One bound LLaVA."""

    def __init__(self, model: Any):
        self.model = model
        core, config = model.model, model.config
        self.core, self.tower, self.projector, self.lm = core, core.vision_tower, core.multi_modal_projector, core.language_model
        self.arch = _hf_vit.arch(self.tower)
        self.image_token = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
        if self.arch is None:
            raise UnsupportedError(f"LLaVA with a {type(self.tower).__name__} tower is not supported; there are CLIP, SigLIP and DINOv2")
        if type(self.lm).__name__ not in TEXT:
            raise UnsupportedError(f"LLaVA with a {type(self.lm).__name__} language model is not supported; there are {', '.join(TEXT)}")
        depth = len(_hf_vit.layers(self.tower))
        feature = config.vision_feature_layer
        # hidden_states[0] is the embedding, so index i is the output of block i - 1; a list of layers needs equal lengths, so no block may cut.
        self.used = feature % (depth + 1) if isinstance(feature, int) else 0
        side = self.tower.config.image_size // self.tower.config.patch_size
        self.prefix = _hf_vit.prefix(self.tower)
        if (config.vision_feature_select_strategy == "default") != (self.prefix == 1):
            raise UnsupportedError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a {self.arch} tower "
                "gives the language model something else than the patches"
            )
        tokens, text = side * side, config.text_config
        tower = frozenset({"projections", "prefix"} | ({"class_token"} if self.prefix else set()))
        self.geometry = Geometry(
            family="llava",
            arch=self.arch,
            tokens=tokens,
            grid=(side, side),
            prefix=self.prefix,
            vision_layers=self.used,
            vision_depth=depth,
            llm_layers=text.num_hidden_layers,
            provides={"pixels": frozenset(), "vision": tower, "projector": frozenset(), "llm": frozenset({"query_attention", "layers"})},
        )
        v = self.tower.config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.cost = Shapes(
            vd=v.hidden_size,
            vf=getattr(v, "intermediate_size", None) or int(v.hidden_size * v.mlp_ratio),
            vheads=v.num_attention_heads,
            vdepth=depth,
            patch=3 * v.patch_size**2 * v.hidden_size,
            prefix=self.prefix,
            proj=sum(m.weight.numel() for m in self.projector.modules() if isinstance(m, nn.Linear)),
            d=text.hidden_size,
            heads=text.num_attention_heads,
            hd=head,
            kv=text.num_key_value_heads,
            f=text.intermediate_size,
            depth=text.num_hidden_layers,
            vocab=text.vocab_size,
            bytes=next(self.lm.parameters()).element_size(),
        )

    tower_mask = "attention_mask"

    def tower_blocks(self) -> list[nn.Module]:
        return _hf_vit.layers(self.tower)[: self.used]

    def decoder_layers(self) -> list[nn.Module]:
        return list(self.lm.layers)

    def all_layers(self) -> list[nn.Module]:
        return self.decoder_layers()

    def branch(self, layer: int) -> nn.Module:
        """A copy of decoder layer ``layer`` that belongs to nobody (its hooks are not copied)."""
        source = self.lm.layers[layer]
        parameter = next(source.parameters())
        with torch.random.fork_rng(devices=[]):  # the throw-away initialisation must not move the user's random numbers
            fresh = type(source)(self.lm.config, layer_idx=layer).to(parameter.device, parameter.dtype)
        fresh.load_state_dict(source.state_dict())
        return copy.deepcopy(fresh).train(source.training)

    def reseed(self, seed: int) -> None:
        for engine in self.engines:
            engine.seed = seed

    def install(self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Any, *, positions: str, seed: int) -> None:
        tower = [c for c in cuts if c.site == "pixels" or c.site.startswith("vision.")]
        projector = [c for c in cuts if c.site == "projector"]
        inner = [c for c in cuts if c.site.startswith("llm.")]
        entry = bool(tower or projector)
        engine: TowerEngine | None = None
        if entry:
            last: dict[str, Run] = {}
            described = _hf_vit.describe(self.tower, self.used if tower else 0)
            engine = TowerEngine(described, tower, ledger, seed=seed, done=lambda run: last.__setitem__("run", run), tokens=self.geometry.tokens)

            def expand(module: nn.Module, args: tuple, kwargs: dict, features: Tensor) -> Tensor | None:
                run = last.pop("run", None)
                if run is None:
                    return None
                for cut in projector:
                    view = run.view(features, cut, grid=self.geometry.grid, prefix=0, depth=1, seed=engine.seed, sources={})
                    selection = cut.select(view)
                    if selection is not None:
                        features = run.apply(features, selection, cut)
                recorder.vision(run)
                if (
                    features.shape[1] == run.tokens
                    and bool(run.valid.all())
                    and torch.equal(run.index, torch.arange(run.tokens, device=run.index.device).expand_as(run.index))
                ):
                    return features
                g, _, c = features.shape
                out = sentinel(c, features).expand(g, run.tokens + 1, c)
                where = torch.where(run.valid, run.index, run.tokens)
                return out.scatter(1, where[..., None].expand(-1, -1, c), features)[:, : run.tokens]

            ledger.after(self.projector, expand)

        def done(request: Request) -> None:
            decoder.finish_counts(request)
            recorder.finished(request)

        decoder = DecoderEngine(
            Decoder(self.model, self.lm, self.lm.layers, lambda ids: ids == self.image_token, self.geometry.tokens, self.geometry.grid),
            inner,
            ledger,
            positions=positions,
            entry=entry,
            seed=seed,
            done=done,
        )
        self.engines = [e for e in (engine, decoder) if e is not None]


# ----------------------------------------------------------------------------------------------------------- tiny models


def _tiny(tower: str, text: str, layers: int = 6) -> tuple[nn.Module, dict[str, Any]]:
    """A random LLaVA of a few thousand parameters with 16 visual tokens, and inputs: two left-padded prompts of unequal length with one image each."""
    from transformers import (
        CLIPVisionConfig,
        Dinov2Config,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
        Qwen2Config,
        SiglipVisionConfig,
    )

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 5, "image_size": 32, "patch_size": 8}
    visions = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig, "dinov2": Dinov2Config}
    extra: dict[str, Any] = {} if tower == "dinov2" else {"intermediate_size": 64}
    if tower == "siglip":
        extra["vision_use_head"] = False
    texts = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    words: dict[str, Any] = {"sliding_window": None} if text != "llama" else {}
    config = LlavaConfig(
        vision_config=visions[tower](**sizes, **extra),
        text_config=texts[text](
            vocab_size=64,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **words,
        ),  # fmt: skip
        image_token_index=3,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
    )
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    torch.random.set_rng_state(torch_state)
    _hf_vit.randomise(model, 1)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(2)
    ids = torch.zeros(2, 30, dtype=torch.long)
    for row, start in ((0, 0), (1, 5)):
        ids[row, start:] = torch.randint(4, 64, (30 - start,), generator=generator)
        ids[row, start + 3 : start + 19] = 3
    return model, {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
    }


ADAPTERS.register(
    "llava",
    AdapterInfo(
        name="llava",
        idea="LLaVA-1.5 on transformers: CLIP / SigLIP / DINOv2 tower, Llama / Mistral / Qwen2 text",
        matches=lambda m: type(m).__name__ == "LlavaForConditionalGeneration",
        bind=Llava,
        tiny={f"{v}-{t}": partial(_tiny, v, t) for v, t in (("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "mistral"), ("dinov2", "llama"))},
    ),
)
