"""``easy_vqa`` and ``scenes`` as ordinary lmms-eval task folders: a YAML, a ``utils.py``, and the questions with their
pictures in a Parquet file."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

from ..core.types import VtpruneError
from ..measure.run import MAX_NEW_TOKENS
from ..measure.samples import SETS, Sample

TASKS = {"easy_vqa": "easy-vqa", "scenes": "scenes"}  # lmms-eval's name -> ours


def export(folder: Path, samples: int, names: tuple[str, ...] = tuple(TASKS)) -> list[Path]:
    """Writes a folder for each of ``names`` into ``folder``, with the questions that ``vtprune bench --samples`` asks,
    in the same order, and returns them.

    Raises :class:`VtpruneError` for an unknown name and if a file cannot be written.
    """
    unknown = sorted({*names} - {*TASKS})
    if unknown:
        raise VtpruneError(f"no local task {unknown[0]!r}; there are {', '.join(TASKS)}")
    out = []
    for name in names:
        try:
            out.append(_export(folder / name, name, SETS[TASKS[name]](samples)))
        except OSError as e:
            raise VtpruneError(f"cannot write {folder / name}: {e.strerror or e}") from e
    return out


def _export(folder: Path, name: str, samples: list[Sample]) -> Path:
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    abilities = [metric(s.ability) for s in samples]
    columns = {
        "image": [{"bytes": _png(s), "path": None} for s in samples],
        "question": [s.question for s in samples],
        "answer": [s.answer for s in samples],
        "ability": abilities,
        "source": [s.source for s in samples],
    }
    text = datasets.Value("string")
    features = datasets.Features(
        {"image": datasets.Image(), "question": text, "answer": text, "ability": text, "source": text}
    )
    data = folder / "test.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(data))
    shutil.copyfile(Path(__file__).with_name("task_utils.py"), folder / "utils.py")
    metrics = "".join(
        f"  - {{metric: {m}, aggregation: mean, higher_is_better: true}}\n" for m in ("accuracy", *sorted({*abilities}))
    )
    (folder / f"{name}.yaml").write_text(
        f"""task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: "{data.resolve()}"}}}} # absolute: lmms-eval knows no path relative to this file
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: !function utils.doc_to_target
process_results: !function utils.process_results
generation_kwargs: {{max_new_tokens: {MAX_NEW_TOKENS}, temperature: 0, do_sample: false}}
metric_list:
{metrics}metadata: {{version: 1.0}}
""",
        encoding="utf-8",
    )
    return folder


def metric(ability: str) -> str:
    """An ability as the name of a metric: ``yes/no`` is ``yes_no``."""
    return re.sub(r"\W", "_", ability)


def _png(sample: Sample) -> bytes:
    buffer = io.BytesIO()
    sample.picture().save(buffer, "PNG")
    return buffer.getvalue()
