"""Named sets of lmms-eval tasks (0.7.3), data only. ``docs/datasets.md`` says where their data comes from and how to
have it on disk."""

from __future__ import annotations

SUITES: dict[str, tuple[str, ...]] = {
    # What papers on visual-token pruning report.
    "standard": (
        "gqa",
        # MMBench English dev, answers read by rules; mmbench_en_dev is the same set with an API behind it
        "mmbench_en_dev_static",
        "mme",  # perception and cognition, two scores
        "pope",
        "scienceqa_img",  # ScienceQA-IMG
        "textvqa_val",
        "vqav2_val",
        "seedbench",  # SEED-Bench; the papers' SEED-I is its metric seed_image
        "mmvet",  # MM-Vet
        "vizwiz_vqa_val",
    ),
    # Where pruning breaks: places, small print, small objects, long answers, hallucination, several images, video.
    "hard": (
        "refcoco_bbox_rec_val",  # expression -> box; refcoco_bbox_* is the other way round (box -> expression)
        "refcoco+_bbox_rec_val",
        "refcocog_bbox_rec_val",
        "ocrbench",
        "docvqa_val",
        "chartqa",
        "coco_cap_chair",  # CHAIR on COCO captions: hallucinated objects and recall
        "hallusion_bench_image",
        "vstar_bench",  # V*Bench
        "mmstar",
        "muirbench",  # several images
        "videomme",  # Video-MME without subtitles
    ),
    # The bundled sets; their task files come with vtprune, not with lmms-eval.
    "local": ("easy_vqa", "scenes"),
}

# Tasks whose score is given by a language model behind an API. Without a key lmms-eval scores every answer of mmvet 0
# and every one of the other as unclear.
JUDGED = ("mmvet", "hallusion_bench_image")

NOTES: dict[str, str] = {
    "gqa": (
        "loads its images from the hub's id in code, so local parquet files do not serve it: fill the Hugging Face "
        "cache"
    ),
    "mmbench_en_dev_static": "mmbench_en_dev asks an API about answers its rules cannot read and, without a key, guesses after long retries",  # noqa: E501
    "mme": (
        "papers print perception alone (about 1510 for LLaVA-1.5-7B) or perception plus cognition (about 1862): "
        "compare like with like"
    ),
    "pope": (
        "an answer counts only if it is exactly yes or no; one score over everything, where papers may print a mean "
        "over three parts (group pope_full)"
    ),
    "textvqa_val": "no OCR tokens in the prompt by default, where LLaVA's own protocol gives them",
    "vqav2_val": "papers may report test-dev, which is scored on a server (vqav2_test)",
    "seedbench": "images and video frames; SEED-I of the papers is the metric seed_image",
    "mmvet": (
        "needs an LLM judge (OPENAI_API_KEY; model in MODEL_VERSION); the default prompt asks for reasoning step by "
        "step"
    ),
    "refcoco_bbox_rec_val": (
        "only with a checkpoint that prints [x1, y1, x2, y2] from 0 to 1 (LLaVA-1.5); for the Qwen-VL families "
        "refcoco_grounding"
    ),
    "refcoco+_bbox_rec_val": "as refcoco_bbox_rec_val",
    "refcocog_bbox_rec_val": "as refcoco_bbox_rec_val",
    "coco_cap_chair": "needs NLTK's tokenizer, tagger and WordNet on disk; lower is better, but for coco_cap_recall. AMBER is amber_g",  # noqa: E501
    "hallusion_bench_image": "needs an LLM judge (OPENAI_API_KEY; gpt-4 is fixed in the task's code)",
    "muirbench": "several images in a prompt: the model must take them",
    "videomme": "video: archives are unpacked below HF_HOME; a model for images alone cannot run it",
}
