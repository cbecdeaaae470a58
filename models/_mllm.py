"""What the adapters of multimodal models share: the stage behind the projector, the decoder engine, copies of decoder layers, the language model's shapes."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..ledger import UndoLedger
from ..types import Geometry, UnsupportedError
from ._cost import Shapes
from ._decoder import Decoder, DecoderEngine, Request, sentinel
from ._hf_vit import randomise
from ._tower import Run, TowerEngine
from .base import PlannedCut

TEXT = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")


class Mllm:
    """One bound model. A family says where its parts are; ``geometry.tokens`` is the number of placeholders of one image (or tile)."""

    tower_mask: str | None = None

    def __init__(self, model: Any, *, geometry: Geometry, projector: Any, lm: Any, image_token: int, vision: dict[str, int]):
        if type(lm).__name__ not in TEXT:
            raise UnsupportedError(f"{geometry.family} with a {type(lm).__name__} language model is not supported; there are {', '.join(TEXT)}")
        window = getattr(lm.config, "sliding_window", None)
        if window and ("sliding_attention" in (getattr(lm.config, "layer_types", None) or ()) or type(lm).__name__ == "MistralModel"):
            raise UnsupportedError(
                f"sliding-window attention (window {window}) counts rows that pruning removes and is not supported; for prompts that fit into the window, "
                "load the model with config.text_config.sliding_window=None"
            )
        self.model, self.geometry, self.projector, self.lm, self.image_token = model, geometry, projector, lm, image_token
        text = lm.config
        self.cost = Shapes(
            **vision,
            proj=sum(m.weight.numel() for m in projector.modules() if isinstance(m, nn.Linear)),
            d=text.hidden_size,
            heads=text.num_attention_heads,
            hd=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            kv=text.num_key_value_heads,
            f=text.intermediate_size,
            depth=text.num_hidden_layers,
            vocab=text.vocab_size,
            bytes=next(lm.parameters()).element_size(),
        )

    def tower_engine(self, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: int, done: Any) -> TowerEngine | None:
        """Serves ``cuts`` inside the tower (and before it); ``None`` for a family that offers none there."""
        return None

    def tower_blocks(self) -> list[nn.Module]:
        return []

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
        self.seed = seed
        for engine in self.engines:
            engine.seed = seed

    def install(self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Any, *, positions: str, seed: int) -> None:
        tower = [c for c in cuts if c.site == "pixels" or c.site.startswith("vision.")]
        projector = [c for c in cuts if c.site == "projector"]
        inner = [c for c in cuts if c.site.startswith("llm.")]
        entry, self.seed, tokens = bool(tower or projector), seed, self.geometry.tokens
        engine: TowerEngine | None = None
        if entry:
            passes = threading.local()  # the tower's pass that the projector's call belongs to

            def passed(run: Run) -> None:
                passes.last = run

            engine = self.tower_engine(tower, ledger, seed=seed, done=passed)

            def expand(module: nn.Module, args: tuple, kwargs: dict, features: Tensor) -> Tensor | None:
                run: Run | None = Run.start(len(features), tokens, features.device)
                if engine is not None:
                    run, passes.last = getattr(passes, "last", None), None
                if run is None:
                    return None
                for cut in projector:
                    view = run.view(features, cut, grid=self.geometry.grid, prefix=0, depth=1, seed=self.seed, sources={})
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
            Decoder(self.model, self.lm, self.lm.layers, lambda ids: ids == self.image_token, tokens, self.geometry.grid),
            inner,
            ledger,
            positions=positions,
            entry=entry,
            seed=seed,
            done=done,
        )
        self.engines = [e for e in (engine, decoder) if e is not None]


# ----------------------------------------------------------------------------------------------------------- tiny models


def tiny_text(layers: int = 6, **more: Any) -> dict[str, Any]:
    """Keywords of a Llama-like configuration of a few thousand parameters; grouped keys, 64 words, no sliding window."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {"vocab_size": 64, **sizes, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}


def tiny_model(kind: Any, config: Any, *, image_token: int, tokens: int, images: tuple[int, ...] = (1, 1), side: int = 32) -> tuple[nn.Module, dict[str, Any]]:
    """A random model of class ``kind`` and inputs: left-padded prompts of unequal length, ``images`` images each, pixels ``[n, 3, side, side]``."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = kind(config).eval()
    torch.random.set_rng_state(state)
    randomise(model, 1)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(2)
    lengths = [14 - 5 * b + n * tokens for b, n in enumerate(images)]  # text and visual tokens
    ids = torch.zeros(len(images), max(lengths), dtype=torch.long)
    for b, (length, n) in enumerate(zip(lengths, images, strict=True)):
        start = max(lengths) - length
        ids[b, start:] = torch.randint(4, 64, (length,), generator=generator)
        ids[b, start + 3 : start + 3 + n * tokens] = image_token
    pixels = torch.randn(sum(images), 3, side, side, generator=generator)
    return model, {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}
