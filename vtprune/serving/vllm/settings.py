"""What a vLLM server is told: the recipe, and what the engine's configuration has to say for it."""

from __future__ import annotations

import os
from typing import Any

from ...core.planning import load_recipe
from ...core.recipe import Recipe, asked_budget
from ...core.types import UnsupportedError, VtpruneError

RECIPE, KEEP = "VTPRUNE_RECIPE", "VTPRUNE_KEEP"
OURS = "vtprune"  # our key in --mm-processor-kwargs, and our field of a configuration and of an image's tensors
ENCODED = "encoded"  # instead of a recipe: the server takes images that vtprune has encoded, and no others
ROPES = ("default", "linear", "llama3")  # rotary tables that do not depend on how long they are
LONGER = 4  # how many times as many positions as the model has been trained for a request may span: vLLM's own factor


def from_environment(kwargs: Any = None) -> Recipe | None:
    """The recipe of ``VTPRUNE_RECIPE`` (a name, or a recipe's file), with the budget of ``VTPRUNE_KEEP`` or of the
    processor's keyword ``vtprune``, ``{"keep": 64}``; ``None`` where it is :data:`ENCODED`.

    Raises:
        VtpruneError: no recipe; an unknown one; a budget that is none.
    """
    name = os.environ.get(RECIPE)
    if not name:
        raise VtpruneError(f"{RECIPE} names no recipe")
    keep = asked(kwargs)
    if name == ENCODED:
        if keep is not None or os.environ.get(KEEP):
            raise VtpruneError(f"{RECIPE}={ENCODED}: budgets are for where images are encoded")
        return None
    recipe = load_recipe(name)
    if keep is None and (text := os.environ.get(KEEP)):
        keep = _number(text)
    return recipe if keep is None else recipe.override(keep=keep)


def asked(kwargs: Any) -> int | float | None:
    """The budget in the processor's keywords of a server or request. Raises :class:`VtpruneError`."""
    ours = (kwargs or {}).get(OURS)
    if ours is None:
        return None
    if not isinstance(ours, dict) or set(ours) - {"keep"}:
        raise VtpruneError(f'"{OURS}" of the processor\'s keywords is an object with "keep", not {ours!r}')
    return asked_budget(ours.get("keep"))


def _number(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError as e:
        raise VtpruneError(f"{KEEP}={text!r} is neither a number of tokens (64) nor a fraction (0.25)") from e


class Prepared:
    """vLLM's hook for one architecture: called once, in the process that makes the configuration, which all others are
    sent."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Puts the recipe into the model's configuration, and makes the engine keep positions as it does for models
        with three axes of them whose embeddings bring their positions along."""
        config, images = model_config.hf_config, model_config.multimodal_config
        if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
            raise UnsupportedError("VLLM_USE_RUST_FRONTEND counts an image's rows by itself: switch it off")
        if images is None:
            raise VtpruneError("this vLLM takes no images: unset VTPRUNE_RECIPE")
        if images.video_pruning_rate:
            raise VtpruneError("--video-pruning-rate is vLLM's own pruning: give that or VTPRUNE_RECIPE")
        kwargs = dict(images.mm_processor_kwargs or {})
        recipe = from_environment(kwargs)
        kwargs.pop(OURS, None)
        images.mm_processor_kwargs = kwargs or None
        config.vtprune = {} if recipe is None else recipe.to_dict()
        _check_windows(config.get_text_config())
        if not model_config.uses_mrope:
            _one_axis(config)
        # what makes the engine ask for positions; the classes here make the number of no use
        images.video_pruning_rate = 0.5

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuses what would run past the recipe."""
        if vllm_config.compilation_config.cudagraph_mm_encoder:
            raise UnsupportedError("cudagraph_mm_encoder replays vLLM's own tower, without a recipe: switch it off")
        if vllm_config.speculative_config is not None:
            raise UnsupportedError("speculative decoding has not been tried with pruned images: switch it off")


def _one_axis(config: Any) -> None:
    """A model whose positions have one axis says that it has three, all equal (:mod:`.models` reads one of them)."""
    text = config.get_text_config()
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise UnsupportedError(
            f"a rotary table of the type {rope!r} depends on the length of the prompt, which pruning shortens; "
            f"there are {', '.join(ROPES)}"
        )
    config.mrope_section = [1, 1, 1]


def recipe_of(config: Any) -> Recipe | None:
    """What :class:`Prepared` put into the configuration; ``None``: images come encoded."""
    return Recipe.from_dict(config.vtprune) if config.vtprune else None


def _check_windows(text: Any) -> None:
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True):
        raise UnsupportedError(
            f"the language model has layers with windows of {window} tokens, which would reach further over shortened "
            "prompts"
        )
