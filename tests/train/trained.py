"""What tests of trainings share: a tiny LLaVA, what each method trains beside it, and processes that train together."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch
from vtprune.models.base import ADAPTERS

import vtprune
from vtprune.cli import train as command
from vtprune.train import questions
from vtprune.train.base import TRAININGS
from vtprune.train.fit import fit
from vtprune.train.sources import cuts_in_tower

QUIET = {"say": lambda line: None}
CASES = {name: training.case for name, training in TRAININGS.items()}
PARTS = {name: case["options"] for name, case in CASES.items()}
OWN = [  # others are in test_lora.py, and those of classifiers beside their methods
    name for name, training in TRAININGS.items() if training.part and not training.case.get("pictures")
]


def made():
    """A tiny LLaVA and eight images with the same question and different answers: only the image tells which."""
    model, _ = ADAPTERS.get("llava").tiny["dinov2-llama"]()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    projected = questions.takes_projected(model)
    if projected:
        with torch.no_grad():
            images = torch.stack(list(model.get_image_features(pixel_values=images).pooler_output))
    rows = [
        questions.Row(i, "existence", [1, 5, *[3] * 16, 6 + 5 * i, *[7] * (i % 3)], [20 + i, *[9] * (i % 2), 2])
        for i in range(8)
    ]
    return model, questions.Questions(images, projected, rows)


def suited(case, method):
    """The case as ``method`` can be trained on it: pixels instead of projected images, answers that the model gives."""
    model, data = case
    training = TRAININGS.get(method)
    if cuts_in_tower(model, training, PARTS[method]):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        data = questions.Questions(images, False, data.rows)
    if training.case.get("own"):
        inputs = data.batch(data.rows, torch.device("cpu"))
        with torch.no_grad():
            said = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.argmax(-1)
        rows = [dataclasses.replace(r, answer=[int(s[len(r.ids) - 1])]) for r, s in zip(data.rows, said, strict=True)]
        data = dataclasses.replace(data, rows=rows)
    return model, data


def trained(case, folder, method="dpvr-lf", **how):
    model, data = case
    how = {"steps": 40, "batch": 8, "lr": CASES[method]["lr"], "folder": folder, **PARTS[method], **QUIET, **how}
    return fit(model, data, method, **how)


class Killed(Exception):
    pass


HEAD = """
import sys
from pathlib import Path

import torch
from trained import SHARED, made, suited, trained

torch.set_num_threads(1)
"""


def run_two(folder: Path, script: str, *words: str, head: str = HEAD) -> Path:
    """Runs ``script`` in two processes, with ``folder`` and ``words`` as its arguments: what they leave behind."""
    (folder / "script.py").write_text(head + script)
    here = Path(__file__).parent
    paths = [str(here.parent.parent), str(here.parent), str(here)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command = [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(folder / "script.py"), str(folder), *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return folder / "out.pt"


SHARED = {name: {"steps": 4, "batch": 4, "lr": 1e-2, **case.get("shared", {})} for name, case in CASES.items()}


def fresh(case, method):
    options = {k: v for k, v in CASES[method].get("shared", {}).items() if k != "settings"}
    with vtprune.attach(case[0], method, **PARTS[method], **options) as handle:
        return handle.modules[method].state_dict()


def arguments(*words: str, method: str = "dpvr-lf") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.method_arguments(parser, TRAININGS.get(method))
    return parser.parse_args(list(words), argparse.Namespace(what=method, argv=["train", method, *words]))
