"""How lmms-eval reads and scores a question: exact match without spaces and case. Copied into every exported task
folder; needs nothing but lmms-eval."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def doc_to_target(doc):
    return doc["answer"]


def process_results(doc, results):
    """1.0 or 0.0, for all questions and for those of the same ability."""
    given, right = ("".join(text.lower().split()) for text in (results[0], doc["answer"]))
    return {"accuracy": float(given == right), doc["ability"]: float(given == right)}
