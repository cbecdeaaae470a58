"""Every image-text model class of the installed transformers, made small: attached it is exact, or refused with a
reason. Never a raw error, never wrong."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES
from vtprune.models.parts.hf_vit import randomise
from vtprune.models.parts.tiny import tiny_prompts, tiny_text

import vtprune
from vtprune.check.verify import check
from vtprune.core.planning import bind
from vtprune.core.types import UnsupportedError

IMAGE, VIDEO = 3, 4
TEXT = tiny_text(4, head_dim=12)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
GEMMA4 = {
    **TEXT,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Built from arguments: their configurations cannot be made small afterwards.
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": (
        "gemma4",
        {
            "text_config": {**GEMMA4, "global_head_dim": 16},
            "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 16},
        },
    ),
    "gemma4 with experts": (
        "gemma4",
        {
            "text_config": {
                **GEMMA4,
                "global_head_dim": 12,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 24,
            },
            "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 16},
        },
    ),
    "gemma4 with inputs per layer": (
        "gemma4",
        {
            "text_config": {**GEMMA4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
            "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 16},
        },
    ),
    "gemma4_unified": ("gemma4_unified", {"text_config": {**GEMMA4, "global_head_dim": 16}}),
    "ernie4_5_vl_moe": (
        "ernie4_5_vl_moe",
        {
            "text_config": {
                **TEXT,
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": [24, 24],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
            },
            "vision_config": {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64, "patch_size": 8},
        },
    ),
    "kimi_k25": ("kimi_k25", {}),  # a variant of the generic adapter
}
# Which of these does what, where a release has it: a change is to be seen.
TAKEN = {
    "aria",
    "cohere2_vision",
    "deepseek_vl",
    "exaone4_5",
    "gemma4",
    "gemma4 with experts",
    "gemma4_unified",
    "idefics2",
    "lighton_ocr",
    "minimax_m3_vl",
    "molmo2",
}
TAKEN |= {
    "ovis2",
    "qianfan_ocr",
    "video_llama_3",
    "video_llava",
    "vipllava",
    "aya_vision",
    "hyperclovax_vision_v2",
    "llava_next_video",
    "got_ocr2",
}
STATE = "carry a state"
REASONS = {
    "qwen3_5": STATE,
    "qwen3_5_moe": STATE,
    "minicpmv4_6": STATE,
    "minicpmv4_7": STATE,
    "lfm2_vl": STATE,
    "lfm3_vl": STATE,
    "llama4": "chunks",
    "mllama": "cross-attention",
    "gemma4 with inputs per layer": "an input of their own per token",
    "ernie4_5_vl_moe": "time, row and column",
    "unlimited_ocr": "not known here",
    "blip-2": "runs the language model by itself",
    "t5gemma2": "encoder-decoder",
}
LARGE = {
    "apertus1p5",
    "aria",
    "emu3",
    "perception_lm",
    "fast_vlm",
    "gemma3n",
    "hunyuan_vl",
    "janus",
    "muse_spark",
    "step3p7",
}  # parts that do not become small
OWN = {
    "llava",
    "llava_next",
    "llava_onevision",
    "gemma3",
    "shieldgemma2",
    "paligemma",
    "mistral3",
    "smolvlm",
    "idefics3",
    "internvl",
    "qwen2_vl",
    "qwen2_5_vl",
}
OWN |= {"qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "glm46v", "glmga", "kimi_k25"}  # other tests'
TRIED = [n for n in {**dict.fromkeys(NAMES), **BUILT} if n not in OWN and BUILT.get(n, (n,))[0] in NAMES]

SMALL: dict[str, Any] = {
    **TEXT,
    **dict.fromkeys(
        (
            "depth",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        2,
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "linear_num_key_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        (
            "embed_dim",
            "projection_dim",
            "vision_hidden_size",
            "mm_hidden_size",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "mlp_dim",
        ),
        32,
    ),
    **dict.fromkeys(("out_hidden_size", "d_model", "projector_hidden_size", "text_hidden_size", "hidden_dim"), 48),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "num_position_embeddings"), 16),
    **dict.fromkeys(
        ("qk_rope_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "patch_size"), 8
    ),
    **dict.fromkeys(("v_head_dim", "global_head_dim", "sliding_window"), 12),
    "moe_intermediate_size": 24,
    "image_size": 32,
    "num_kv_shared_layers": 0,
}
SEES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}


def _shrink(config: Any, vision: bool = False) -> Any:
    """Every size in a configuration and in those in it, by the names that sizes go by."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value, "vis" in name or "tower" in name)
    for name, value in SMALL.items():
        old = getattr(config, name, None)
        if old is None or isinstance(old, dict) or isinstance(getattr(type(config), name, None), property):
            continue
        value = SEES.get(name, value) if vision else value
        setattr(config, name, type(old)([value] * len(old)) if isinstance(old, list | tuple) else value)
    layers = getattr(config, "num_hidden_layers", None)
    if (kinds := vars(config).get("layer_types")) and layers:
        config.layer_types = (list(dict.fromkeys(kinds)) * layers)[:layers]
    for name in ("mlp_layer_types", "moe_layer_freq"):
        if isinstance(vars(config).get(name), list) and layers:
            setattr(config, name, vars(config)[name][:layers])
    return config


def _build(name: str) -> Any:
    import transformers

    kind, arguments = BUILT.get(name, (name, {}))
    try:  # what a configuration of other sizes than its authors thought of may answer
        config = CONFIG_MAPPING[kind](**arguments) if arguments else _shrink(CONFIG_MAPPING[kind]())
        for token, what in ((VIDEO, "video"), (IMAGE, "image")):  # Molmo has one for both
            for place in (f"{what}_token_id", f"{what}_token_index"):
                if isinstance(getattr(config, place, None), int):
                    setattr(config, place, token)
        torch.manual_seed(0)
        model = getattr(transformers, NAMES[kind])(config).eval()
    except Exception as e:
        if name in BUILT:
            raise
        pytest.skip(f"not made small here: {type(e).__name__}: {e}")
    randomise(model, 1)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def _prompt(model: Any, counts: list[int]) -> dict[str, Any]:
    inputs = tiny_prompts([[(bind(model).image_token, n)] for n in counts])
    takes = {**inspect.signature(model.forward).parameters, **inspect.signature(model.base_model.forward).parameters}
    kinds = {"mm_token_type_ids": (inputs["input_ids"] == bind(model).image_token).int()}
    return {**inputs, **{k: v for k, v in kinds.items() if k in takes}}


def _inputs(model: Any) -> tuple[dict[str, Any], bool]:
    """A batch of prompts with pictures in the first form that the model takes, or with placeholders alone."""
    square, patches = torch.tensor([[32, 32]]), torch.tensor([[1, 8, 8]])
    forms: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
        ((1, 3, 32, 32), {}),
        ((1, 1, 3, 32, 32), {}),
        ((1, 3, 32, 32), {"image_sizes": square}),
        ((64, 384), {"image_grid_thw": patches}),
        ((64, 192), {"image_grid_thw": patches, "image_merge_sizes": torch.tensor([2])}),
    )
    encode = getattr(model.base_model, "get_image_features", None)
    for shape, more in (
        forms if encode is not None and "pixel_values" in inspect.signature(model.forward).parameters else ()
    ):
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        try:
            out = encode(pixels, **more)  # type: ignore[misc]
            rows = getattr(out, "pooler_output", out)
            rows = rows if isinstance(rows, torch.Tensor) else torch.cat(list(rows))
            inputs = {**_prompt(model, [rows.numel() // rows.shape[-1]]), "pixel_values": pixels, **more}
            model(**inputs)
        except Exception:  # another form is wanted
            continue
        return inputs, True
    return _prompt(model, [16, 9]), False


def _attached(model: Any, method: str) -> str | None:
    """The reason for a refusal."""
    try:
        vtprune.attach(model, method).remove()
    except UnsupportedError as e:
        assert len(str(e)) > 30, e
        return str(e)
    return None


PICTURED = {
    "aya_vision",
    "cohere2_vision",
    "deepseek_vl",
    "exaone4_5",
    "idefics2",
    "lighton_ocr",
    "ovis2",
    "qianfan_ocr",
    "video_llama_3",
}  # not by placeholders alone


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in TRIED])
def test_exact_or_refused(name):
    model = _build(name)
    why = {m: _attached(model, m) for m in ("random", "fastv", "pyramiddrop", "flowcut")}
    assert why["flowcut"] is not None
    if why["random"] is not None:
        assert name not in TAKEN and REASONS.get(name, "") in why["random"], why["random"]
        return
    assert name not in REASONS
    names = [f"{what}_token_{end}" for what in ("image", "video") for end in ("id", "index")]
    tokens = [token for n in names if isinstance(token := getattr(model.config, n, None), int)]
    assert bool(bind(model).visual(torch.tensor([tokens])).all()), (
        "a placeholder that the model knows would stay dense without a word"
    )
    with torch.no_grad():
        inputs, seen = _inputs(model)
    assert seen or name not in PICTURED
    for method in ("random", "fastv"):
        if why[method] is None:
            options = {"keep": 0.5} if method == "random" else {"keep": 0.4, "layer": 2}
            for check_name in ("prefill_is_masked_dense", "decode_is_masked_dense"):
                result = check(check_name, model, method, inputs, **options)
                assert result.passed, (
                    f"{method} {check_name}, {'pictures' if seen else 'placeholders'}: {result.detail}"
                )
