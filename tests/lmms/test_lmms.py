"""The lmms-eval plugin: the same answers as the library's own benchmark, and no failure that looks like an answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image
from vtprune.models.engine.host import cache_of, cached

import vtprune
from choice import budget_of
from fake import film, picture, video_model
from vtprune.cli import main
from vtprune.inputs import demo_model, videos
from vtprune.inputs.chats import prepare
from vtprune.lmms import errors, one, tasks
from vtprune.lmms.model import Chat, Simple
from vtprune.measure import bench, samples, statistics
from vtprune.measure import run as run_module
from vtprune.measure.runs import RunError

SIZE = 4  # easy-VQA questions, and scenes
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # tests share the cores


@pytest.fixture(scope="module")
def bundled():
    return vtprune.load_demo_model()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tasks.export(folder, SIZE)
    return folder


@pytest.fixture(scope="module")
def manager(exported):
    return TaskManager("ERROR", include_path=str(exported), model_name="vtprune")


def questions(name: str) -> list[samples.Sample]:
    return samples.SETS[tasks.TASKS[name]](SIZE)


MADE: list[Chat] = []


def plugin(bundled, cls=Chat, **arguments) -> Chat:
    MADE.append(cls(loaded=bundled, exits=False, device="cpu", **arguments))
    return MADE[-1]


@pytest.fixture(autouse=True)
def cleaned():
    """No test leaves a recipe in the shared model."""
    yield
    while MADE:
        MADE.pop().clean()


def evaluated(lm: Chat, manager, names: list[str], limit: int | None = None) -> tuple[dict, dict]:
    """lmms-eval's results, and its answers by task and number."""
    out = simple_evaluate(
        model=lm, tasks=names, task_manager=manager, verbosity="ERROR", limit=limit, bootstrap_iters=0
    )
    return out, {n: {s["doc_id"]: s["filtered_resps"][0] for s in out["samples"][n]} for n in names}


# ------------------------------------------------------------------------------------------------------------ finding
# it


def test_the_entry_point_resolves():
    found = {e.name: e for e in entry_points(group="lmms_eval.models")}
    (manifest,) = found["vtprune"].load()()
    assert manifest.model_id == "vtprune"
    assert get_model("vtprune") is Chat and get_model("vtprune", force_simple=True) is Simple


def test_the_manifest_is_light():
    code = (
        "import sys; from vtprune.lmms.manifest import manifests; manifests(); print('vtprune.lmms.model' in "
        "sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.ci
def test_exported_tasks_ask_what_the_benchmark_asks(exported, manager):
    import datasets

    for name in tasks.TASKS:
        data = datasets.load_dataset("parquet", data_files=str(exported / name / "test.parquet"), split="train")
        expected = questions(name)
        assert [(d["question"], d["answer"], d["source"]) for d in data] == [
            (s.question, s.answer, s.source) for s in expected
        ]
        assert all(
            d["image"].convert("RGB").tobytes() == s.picture().tobytes() for d, s in zip(data, expected, strict=True)
        )
        assert name in manager.all_tasks
    with pytest.raises(vtprune.VtpruneError, match="no local task 'gqa'"):
        tasks.export(exported, 1, ("gqa",))


# ------------------------------------------------------------------------------------------------- equal to the
# benchmark


@pytest.mark.ci
def test_every_recipe_answers_as_the_benchmark_does(bundled, manager, some_method):
    budget = budget_of(bundled[0], some_method)
    lm = plugin(bundled, recipe=some_method, batch_size=3, **budget)
    out, answers = evaluated(lm, manager, ["easy_vqa", "scenes"], limit=5)
    tokens = []
    for name in ("easy_vqa", "scenes"):
        part = questions(name)[:5]
        expected = run_module.evaluate(*bundled, part, some_method, **budget)
        tokens.append(expected["effective_tokens"])
        assert answers[name] == dict(enumerate(expected["answers"]))
        assert out["results"][name]["accuracy,none"] == pytest.approx(sum(expected["correct"]) / len(part))
    # a question that comes twice is answered, and counted, once: budgets that follow the picture differ a little
    assert out["throughput"]["avg_effective_tokens"] == pytest.approx(sum(tokens) / 2, rel=1e-3)
    assert out["throughput"]["avg_failed"] == 0 and out["throughput"]["avg_ttft_ms"] > 0
    vtprune.attach(bundled[0], "random").remove()  # the recipe is out again


@pytest.mark.ci
def test_abilities_are_metrics_of_their_own(bundled, manager):
    out, _ = evaluated(plugin(bundled, batch_size=8), manager, ["scenes"])
    part = questions("scenes")
    expected = statistics.means(run_module.evaluate(*bundled, part, None)["correct"], (s.ability for s in part))
    assert {k.removesuffix(",none") for k in out["results"]["scenes"] if k.endswith(",none")} >= {*expected, "accuracy"}
    assert all(out["results"]["scenes"][f"{a},none"] == pytest.approx(v) for a, v in expected.items())


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(exported, bundled, tmp_path):
    """The command of the README, under the launcher."""
    given = f"pretrained={demo_model.FOLDER},recipe=random,effective_tokens=0.25,report={tmp_path / 'costs.json'}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "lmms_eval",
        "--model",
        "vtprune",
        "--model_args",
        given,
    ]
    command += [
        "--tasks",
        "easy_vqa,scenes",
        "--include_path",
        str(exported),
        "--batch_size",
        "4",
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
    ]
    surroundings = {**os.environ, **OFFLINE, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, "--device", "cpu"], env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("easy_vqa", "scenes"):
        (path,) = (tmp_path / "out").glob(f"*/*_samples_{name}.jsonl")
        found = {e["doc_id"]: e["filtered_resps"] for e in map(json.loads, path.read_text().splitlines())}
        assert found == dict(
            enumerate(run_module.evaluate(*bundled, questions(name), "random", effective_tokens=0.25)["answers"])
        )
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert (
        costs["processes"] == 2
        and costs["samples"] == sum(len(questions(n)) for n in tasks.TASKS)
        and costs["attention"] == "sdpa"
    )


# ----------------------------------------------------------------------------------------------------------- requests
# by hand


def metadata(number: int) -> dict:
    return {"task": "t", "doc_id": number, "repeats": 1}


def request(number: int, settings: dict | None = None, kind: str = "generate_until", **more) -> Instance:
    def messages(doc, **round_):
        return (
            doc["turns"](**round_)
            if round_
            else [{"role": "user", "content": [*doc["pictures"], {"type": "text", "text": doc["text"]}]}]
        )

    arguments = ("", messages, settings or {"max_new_tokens": 5, "until": ["\n\n"]}, number, "t", "test")
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata(number) | more)


def docs(lm: Chat, n: int = 6) -> list[samples.Sample]:
    part = samples.easy_vqa_samples(n)
    entries = [{"pictures": [{"type": "image", "url": s.picture()}], "text": s.question} for s in part]
    lm.task_dict = {"t": {"test": entries}}
    return part


def test_settings_until_and_text_without_pictures(bundled):
    dense = run_module.evaluate(*bundled, samples.easy_vqa_samples(6), "uniform", keep=36)["answers"]
    lm = plugin(bundled, batch_size=4, recipe="uniform", keep=36, system_prompt="")
    docs(lm)
    lm.task_dict["t"]["test"][2]["pictures"] = []
    requests = [
        request(
            i,
            {
                "max_new_tokens": 1 + i % 2,
                "until": [dense[1][2:3]] if i == 1 else ["\n\n"],
                "image_aspect_ratio": "pad",
            },
        )
        for i in range(6)
    ]
    found = lm.generate_until(requests)
    assert [a for i, a in enumerate(found) if i not in (1, 2)] == [a for i, a in enumerate(dense) if i not in (1, 2)]
    assert found[1] == dense[1][:2].strip() and isinstance(found[2], str)
    assert lm._settings(request(0, {"temperature": 0, "top_p": 0.5}))[
        "do_sample"
    ] is False and "top_p" not in lm._settings(request(0, {"top_p": 0.5}))
    drawn = {"temperature": 0.5, "max_new_tokens": 3}
    assert (
        lm._settings(request(0, drawn))["do_sample"] is True
        and lm._settings(request(0, {"do_sample": True}))["do_sample"] is True
    )
    for greedy in ({"temperature": 0.2, "do_sample": False}, {"temperature": 0, "do_sample": True}):
        assert lm._settings(request(0, {**greedy, "max_new_tokens": 5})) == lm._settings(request(0))
    lm.task_dict["t"]["test"][2]["pictures"] = lm.task_dict["t"]["test"][1]["pictures"]
    lm.batch_size = 1
    alone = lm.generate_until([request(i, drawn) for i in range(6)])
    lm.batch_size = 6
    assert alone == lm.generate_until([request(i, drawn) for i in range(6)])
    lm.clean()


def test_beams_of_a_sample_keep_the_same_tokens(bundled):
    lm = plugin(bundled, batch_size=2, recipe="random", keep=20)
    docs(lm, 2)
    found = lm.generate_until([request(i, {"num_beams": 3, "max_new_tokens": 3}) for i in range(2)])
    assert (
        all(found)
        and lm.costs[-1]["samples"] == 2
        and lm.costs[-1]["visual_tokens"] == 2 * 144
        and lm.costs[-1]["effective_tokens"] == 40
    )
    lm.clean()


def test_a_damaged_picture_is_a_failure(bundled, tmp_path, monkeypatch):
    """Although lmms-eval tells Pillow to fill it up."""
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    picture(side=200).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])

    class Lazy(dict):
        def __getitem__(self, key):
            value = super().__getitem__(key)
            return Image.open(value).convert("RGB") if key == "image" else value

    lm = plugin(bundled, Simple)
    lm.task_dict = {
        "t": {"test": [Lazy(image=tmp_path / n, text="what color is it ?") for n in ("whole.png", "cut.png")]}
    }
    requests = [
        Instance("generate_until", ("q", {}, lambda doc: [doc["image"]], i, "t", "test"), 0, metadata(i))
        for i in range(2)
    ]
    with pytest.raises(RunError, match="1 of 2 requests .* t test 1: OSError: .*truncated"):
        lm.generate_until(requests)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_journal_answers_only_the_same_question(bundled, tmp_path):
    def run(settings: dict, **more) -> list[str]:
        lm = plugin(bundled, journal=tmp_path / "j", **more)
        docs(lm, 2)
        try:
            return lm.generate_until([request(i, settings) for i in range(2)])
        finally:
            lm.clean()

    first = run({"max_new_tokens": 1}, recipe="fastv", keep=36)
    assert run({"max_new_tokens": 1}, recipe="fastv", keep=36) == first
    for settings, more in (
        ({"max_new_tokens": 2}, {"keep": 36}),
        ({"max_new_tokens": 1}, {"keep": 36, "positions": "compact"}),
    ):
        with pytest.raises(RunError, match="was made with"):
            run(settings, recipe="fastv", **more)


def test_padding_requests_cost_nothing(bundled):
    lm = plugin(bundled, batch_size=4)
    docs(lm, 2)
    found = lm.generate_until([request(0), request(1), request(1, __padding_only__=True)])
    assert found[2] == "" and sum(c["samples"] for c in lm.costs) == 2


def test_rounds_build_on_each_other(bundled):
    lm = plugin(bundled)
    part = docs(lm, 3)
    seen = []

    def turns(round_idx, previous_output, previous_round_info):
        seen.append((round_idx, previous_output, previous_round_info))
        content = [
            {"type": "image", "url": part[round_idx].picture()},
            {"type": "text", "text": part[round_idx].question},
        ]
        return [{"role": "user", "content": content}], round_idx == 2, None, round_idx

    lm.task_dict["t"]["test"][0]["turns"] = turns
    (answers,) = lm.generate_until_multi_round([request(0, kind="generate_until_multi_round")])
    assert answers == run_module.evaluate(*bundled, part, None)["answers"][:2]
    assert seen == [(1, answers[:1], None), (2, answers, 1)]
    with pytest.raises(vtprune.VtpruneError, match="chat class"):
        plugin(bundled, Simple).generate_until_multi_round([])


def test_videos_several_images_and_text_share_a_run(tmp_path):
    pictures = [{"type": "image", "url": picture(i, 48)} for i in range(3)]
    shown = [[{"type": "video", "url": film(tmp_path / f"{i}.mp4", 40 * i)}] for i in range(2)]
    shown += [pictures[:2], pictures[2:], []]
    found = {}
    for batch in (1, 4):
        lm = Chat(
            loaded=video_model(),
            exits=False,
            device="cpu",
            recipe="fastv",
            keep=0.5,
            layer=1,
            batch_size=batch,
            max_frames=3,
        )
        lm.task_dict = {"t": {"test": [{"pictures": p, "text": "what is it"} for p in shown]}}
        found[batch] = lm.generate_until([request(i, {"max_new_tokens": 4}) for i in range(len(shown))])
        assert (
            sorted(c["visual_tokens"] / c["samples"] for c in lm.costs)[-1] >= 3 * 4 + 1
            and lm.costs[-1]["visual_tokens"] == 0
        )
        lm.clean()
    assert found[1] == found[4] and len({*found[1]}) > 1
    lm = Chat(loaded=video_model(), exits=False, device="cpu")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    lm.task_dict = {
        "t": {
            "test": [
                {"pictures": [{"type": "video", "url": str(tmp_path / n)}], "text": "x"}
                for n in ("bad.mp4", "none.mp4")
            ]
        }
    }
    with pytest.raises(RunError, match="2 of 2 requests") as caught:
        lm.generate_until([request(0), request(1)])
    assert "cannot read the video" in str(caught.value) and "no such video" in lm.failures[1]


def moving(path, shades: list[int]) -> str:
    first, *rest = [Image.new("RGB", (64, 64), (s, 255 - s, 0)) for s in shades]
    first.save(path, save_all=True, append_images=rest, duration=100)
    return str(path)


def test_every_kind_of_video_is_the_same_video(tmp_path):
    """What tasks hand out as a video: files, frames, clips of longer ones, readers of other packages."""
    gif = moving(tmp_path / "a.gif", [0, 100, 200, 250])
    frames = videos.pictures_of(videos.read(gif))
    array = videos.read(gif)[0]

    class Reader:
        def __len__(self):
            return len(array)

        def __getitem__(self, i):
            return array[i]

        def get_avg_fps(self):
            return 10.0

        def get_batch(self, indices):
            return SimpleNamespace(asnumpy=lambda: array[indices])

    kinds = [
        {"type": "video", "url": gif},
        {"type": "image", "url": gif},  # lmms-eval takes a GIF for a picture
        {"type": "video", "url": frames},
        {"type": "video", "url": array},
        {"type": "video", "url": Reader()},
        {"type": "video", "url": {"path": gif, "video_start": 0.0, "video_end": 0.3}},
        {"type": "video", "url": {"path": gif, "video_start": 0.0, "video_end": 0.1}},
    ]
    lm = plugin(video_model(), recipe="evs", keep=0.5, max_frames=4)
    lm.task_dict = {"t": {"test": [{"pictures": [k], "text": "what is it"} for k in kinds]}}
    found = lm.generate_until([request(i, {"max_new_tokens": 4}) for i in range(len(kinds))])
    counts = [c["visual_tokens"] for c in lm.costs]
    assert counts == [counts[0]] * 6 + [2 * 4 + 1] and counts[0] == 4 * 4 + 1 and len({*found[:6]}) == 1
    assert all(c["effective_tokens"] < c["visual_tokens"] for c in lm.costs)


def test_max_frames_are_spread_over_the_video(tmp_path, bundled):
    """And a model that takes no videos is shown them as images."""
    gif = moving(tmp_path / "a.gif", [0, 50, 100, 150, 200, 250])
    seen = []
    lm = plugin(bundled, recipe="evs", keep=0.5, max_frames="3")
    lm.task_dict = {"t": {"test": [{"pictures": [{"type": "video", "url": gif}], "text": "what color is it ?"}]}}
    inner = lm.pruned.inputs
    lm.pruned.inputs = lambda chats: (seen.extend(chats), inner(chats))[1]
    lm.generate_until([request(0, {"max_new_tokens": 2})])
    shown = [p["image"].getpixel((9, 9))[0] for p in seen[0][0]["content"] if p["type"] == "image"]
    assert shown == pytest.approx([0, 100, 250], abs=4) and lm.costs[0]["visual_tokens"] == 3 * 144
    with pytest.raises(vtprune.VtpruneError, match="max_frames='few' is not a number of frames"):
        plugin(bundled, max_frames="few")


def test_videos_that_cannot_be_shown_are_told_one_by_one(tmp_path):
    picture().save(tmp_path / "still.png")
    lm = plugin(video_model())
    shown = [
        {"type": "video", "url": str(tmp_path / "still.png")},
        {"type": "video", "url": {"bytes": b"", "path": None}},
        {"type": "video", "url": 3},
        {"type": "audio", "url": "a.wav"},
        {"type": "video", "url": [picture(), picture(0, 20)]},
    ]
    lm.task_dict = {"t": {"test": [{"pictures": [s], "text": "x"} for s in shown]}}
    with pytest.raises(RunError, match=f"{len(shown)} of {len(shown)} requests"):
        lm.generate_until([request(i) for i in range(len(shown))])
    for failure, words in zip(
        lm.failures, ("still picture", "names no file", "from int", "not audio", "differ in size"), strict=True
    ):
        assert words in failure and "\n" not in failure


FILM_TASK = """
task: clips
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function looks.visual
doc_to_text: !function looks.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.ci
@pytest.mark.parametrize("cls", [Chat, Simple])
def test_a_video_task_runs_through_lmms_eval(tmp_path, bundled, cls):
    rows = [
        {
            "clip": moving(tmp_path / f"{i}.gif", [40 * i, 90, 200, 10]),
            "question": "what color is it ?",
            "answer": "red",
        }
        for i in range(2)
    ]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "clips.yaml").write_text(FILM_TASK.format(data=tmp_path / "clips.jsonl"))
    (folder / "looks.py").write_text(
        "def visual(doc):\n    return [{'type': 'video', 'path': doc['clip']}]\n\n\n"
        "def text(doc):\n    return doc['question']\n"
    )
    name = "vtprune"
    manager = TaskManager("ERROR", include_path=str(folder), model_name=name)
    lm = plugin(bundled, cls, recipe="evs", keep=0.5, max_frames=3, batch_size=2)
    out, answers = evaluated(lm, manager, ["clips"])
    assert sorted(answers["clips"]) == [0, 1] and out["throughput"]["avg_failed"] == 0
    assert sum(c["samples"] for c in lm.costs) == 2
    assert sum(c["visual_tokens"] for c in lm.costs) == 2 * 3 * 144
    assert out["throughput"]["avg_effective_tokens"] == pytest.approx(3 * 144 / 2)


def slow_likelihood(bundled, sample: samples.Sample, words: str) -> tuple[float, bool]:
    """One forward per token, without cache."""
    model, processor = bundled
    inputs, loss, greedy = dict(prepare(processor, [sample.picture()], [sample.question])), 0.0, True
    for token in processor.tokenizer(words, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            chances = model(**inputs).logits[0, -1].log_softmax(-1)
        loss, greedy = loss - float(chances[token]), greedy and int(chances.argmax()) == token
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return loss, greedy


def read_on_likelihood(bundled, sample: samples.Sample, words: str) -> tuple[float, bool]:
    """The prompt is read once, and its continuation token by token from the cache."""
    model, processor = bundled
    inputs, loss, greedy = dict(prepare(processor, [sample.picture()], [sample.question])), 0.0, True
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        for token in processor.tokenizer(words, add_special_tokens=False)["input_ids"]:
            chances = out.logits[0, -1].log_softmax(-1)
            loss, greedy = loss - float(chances[token]), greedy and int(chances.argmax()) == token
            out = model(input_ids=torch.tensor([[token]]), **cached(model, cache_of(out)))
    return loss, greedy


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["fastv", "pyramiddrop", "tome", "random"])
def test_pruned_likelihoods_rank_by_the_prompt_alone(bundled, recipe):
    """The tokens that stay are those of the prompt, whatever continuation is scored."""
    part = samples.easy_vqa_samples(3)
    asked = [(0, "blue"), (0, "red circle yes"), (1, "circle"), (2, "no"), (2, "yes no yes")]
    lm = plugin(bundled, Simple, batch_size=5, recipe=recipe, keep=0.1)
    lm.task_dict = {"t": {"test": [{"image": s.picture(), "text": s.question} for s in part]}}
    requests = [
        Instance("loglikelihood", (part[i].question, w, lambda doc: [doc["image"]], i, "t", "test"), 0, metadata(i))
        for i, w in asked
    ]
    scores = [r.text for r in lm.loglikelihood(requests)]
    lm.clean()
    expected = []
    for i, words in asked:
        with vtprune.attach(bundled[0], recipe, keep=0.1, seed=samples.sample_seed(0, i)):
            expected.append(read_on_likelihood(bundled, part[i], words))
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert [loss for loss, _ in scores] == pytest.approx([loss for loss, _ in expected], abs=5e-4)


@pytest.mark.ci
@pytest.mark.parametrize("batch", [1, 4])
def test_likelihoods_equal_a_slow_loop(bundled, batch):
    part = samples.easy_vqa_samples(3)
    endings = [("blue",), ("circle", "red circle yes"), ("yes", "no")]
    asked = [(i, w) for i, words in enumerate(endings) for w in words]
    expected = [slow_likelihood(bundled, part[i], w) for i, w in asked]
    for more in ({}, {"recipe": "fastv", "keep": 1.0}, {"recipe": "tome", "keep": 1.0}):
        lm = plugin(bundled, Simple, batch_size=batch, **more)
        lm.task_dict = {"t": {"test": [{"image": s.picture(), "text": s.question} for s in part]}}
        requests = [
            Instance("loglikelihood", (part[i].question, w, lambda doc: [doc["image"]], i, "t", "test"), 0, metadata(i))
            for i, w in asked
        ]
        found = [r.text for r in lm.loglikelihood(requests)]
        lm.clean()
        assert sum(c["samples"] for c in lm.costs) == len(asked) and lm.costs[0]["flops"] > 0
        assert [g for _, g in found] == [g for _, g in expected]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=2e-4)


def test_multiple_choice_tasks_run_through_lmms_eval(bundled, exported, tmp_path):
    choices = sorted({s.answer for s in questions("easy_vqa")})
    (tmp_path / "choice.yaml").write_text(
        f"""task: choice
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: "{exported / "easy_vqa" / "test.parquet"}"}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{{choices}.index(answer)}}}}"
doc_to_choice: {json.dumps(choices)}
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    (tmp_path / "utils.py").write_text((exported / "easy_vqa" / "utils.py").read_text())
    here = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    out = simple_evaluate(
        model=plugin(bundled, Simple, batch_size=4),
        tasks=["choice"],
        task_manager=here,
        verbosity="ERROR",
        bootstrap_iters=0,
    )
    assert len(choices) > 2 and out["results"]["choice"]["acc,none"] == 1.0


# ---------------------------------------------------------------------------------------------------------------
# failures


def test_a_failed_request_ends_the_run_and_keeps_the_others(bundled, tmp_path):
    lm = plugin(bundled, batch_size=3, journal=tmp_path / "j", report=tmp_path / "costs.json")
    part = docs(lm)
    lm.task_dict["t"]["test"][4]["pictures"] = [{"type": "image", "url": str(tmp_path / "gone.png")}]
    with pytest.raises(
        RunError, match=r"1 of 6 requests \(generate_until\) failed, nothing is scored; the other answers are kept"
    ) as caught:
        lm.generate_until([request(i) for i in range(6)])
    assert "t test 4: no such image file" in str(caught.value)
    told = json.loads((tmp_path / "costs.json").read_text())
    assert told["failed"] == 1 and told["samples"] == 5 and len(told["failures"]) == 1
    picture().save(tmp_path / "gone.png")
    again = plugin(bundled, batch_size=3, journal=tmp_path / "j")
    again.task_dict = lm.task_dict
    calls = []
    ask = again._answer
    again._answer = lambda *a: calls.append(a[1]) or ask(*a)
    found = again.generate_until([request(i) for i in range(6)])
    expected = run_module.evaluate(*bundled, part, None)["answers"]
    assert calls == [[4]] and [a for i, a in enumerate(found) if i != 4] == [
        a for i, a in enumerate(expected) if i != 4
    ]
    assert sum(c["samples"] for c in again.costs) == 6
    other = plugin(bundled, recipe="uniform", journal=tmp_path / "j")
    other.task_dict = lm.task_dict
    with pytest.raises(vtprune.VtpruneError, match="was made with"):
        other.generate_until([request(i) for i in range(6)])
    other.clean()


def test_under_lmms_eval_a_failure_ends_the_process(bundled, tmp_path):
    lm = Chat(loaded=bundled, device="cpu", batch_size=2)
    docs(lm, 2)
    lm.task_dict["t"]["test"][0]["pictures"] = [{"type": "audio", "url": "a.wav"}]
    with pytest.raises(SystemExit) as caught:
        lm.generate_until([request(0), request(1)])
    assert str(caught.value.code).startswith("vtprune: error: 1 of 2 requests") and "not audio" in str(
        caught.value.code
    )
    for given, reason in (
        ({"recipe": "nope"}, "nope"),
        ({"recipe": "fastv", "kept": 3}, "unknown argument 'kept'"),
        ({"recipe": "fastv", "keep": 9999}, "lies in 1..144"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"recipe": "pyramiddrop", "layers": "3+99"}, "99"),
        ({"device": "nowhere"}, "nowhere"),
        ({"base": "nobody"}, "nobody"),
        ({"base": "nobody", "journal": "j"}, "journal="),
    ):
        with pytest.raises(SystemExit, match="vtprune: refused: ") as caught:
            Chat(**{"loaded": bundled, "device": "cpu", **given})
        assert reason in str(caught.value.code)
    with pytest.raises(SystemExit, match="say which model"):
        Chat(device="cpu")
    with pytest.raises(SystemExit, match="cannot load"):
        Chat(pretrained="/nowhere", device="cpu")
    shutil.copytree(demo_model.FOLDER, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((demo_model.FOLDER / "model.safetensors").read_bytes()[:5000])
    for given in ({"pretrained": str(tmp_path / "cut")}, {"pretrained": str(demo_model.FOLDER), "dtype": "float33"}):
        with pytest.raises(SystemExit, match="vtprune: refused: "):
            Chat(device="cpu", **given)
    vtprune.attach(bundled[0], "random").remove()


class Swallowing:
    """Stands for lmms-eval's own classes, which score a failure as an empty answer."""

    is_simple = False

    def __init__(self, pretrained, device, batch_size, prompt="x", dtype=None):
        self.dtype, self.task_dict = dtype, {}
        self.model, self.processor = vtprune.load_demo_model()
        self.prompt, self.broken = prompt, False

    def set_cache_hook(self, hook):
        self.hook = hook

    def clean(self):
        self.cleaned = True

    def generate_until(self, requests):
        out = []
        for r in requests:
            doc = self.task_dict["t"]["test"][r.args[3]]
            inputs = prepare(self.processor, [doc["pictures"][0]["url"]], [doc["text"] + self.prompt])
            try:
                tokens = self.model.generate(**inputs, max_new_tokens=-1 if self.broken else 5, do_sample=False)
                out.append(
                    self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[
                        0
                    ].strip()
                )
            except ValueError:
                out.append("")
        return out


def test_another_model_as_base(monkeypatch):
    import lmms_eval.models

    monkeypatch.setattr(lmms_eval.models, "get_model", lambda name: {"theirs": Swallowing}[name])
    lm = Chat(base="theirs", prompt="", dtype="float16", recipe="fastv", keep=36, device="cpu", exits=False)
    part = docs(lm, 3)
    lm.base.task_dict = lm.task_dict
    base, model = lm.base, lm.model
    assert base.dtype == "float16"
    with pytest.raises(vtprune.VtpruneError, match="attn_implementation"):
        Chat(base="theirs", attn_implementation="eager", device="cpu", exits=False)
    expected = run_module.evaluate(*vtprune.load_demo_model(), part, "fastv", keep=36)
    assert lm.generate_until([request(i) for i in range(3)]) == expected["answers"]
    assert sum(c["flops"] for c in lm.costs) == expected["flops"]
    base.broken = True
    with pytest.raises(RunError, match="3 of 3 requests"):
        lm.generate_until([request(i) for i in range(3)])
    lm.clean()
    assert base.cleaned and "generate" not in vars(model)
    vtprune.attach(model, "random").remove()


# ------------------------------------------------------------------------------------------------------------ vtprune
# eval


def refused(capsys, *words: str) -> str:
    assert main.main(["eval", *words]) in (1, 2)
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("vtprune: error")]
    return line


def finished(command: list[str], env: dict, stdout, **kwargs) -> subprocess.CompletedProcess:
    """Does what a run of lmms-eval leaves behind."""
    given = dict(part.split("=", 1) for part in command[command.index("--model_args") + 1].split(","))
    if given["recipe"] == "fastv":
        stdout.write(b"vtprune: refused: fastv cannot do that\n")
        return subprocess.CompletedProcess(command, 1)
    costs = {
        "effective_tokens": 36,
        "flops": 1,
        "dense_flops": 2,
        "kv_bytes": 1,
        "dense_kv_bytes": 4,
        "ttft_ms": 5,
        "failed": 0,
        "versions": {"torch": "x"},
    }
    Path(given["report"]).write_text(json.dumps(costs))
    out = Path(command[command.index("--output_path") + 1]) / "model"
    out.mkdir(parents=True)
    (out / "1_results.json").write_text(
        json.dumps({"results": {"scenes": {"alias": "s", "accuracy,none": 0.5}}, "lmms_eval_version": "0"})
    )
    (out / "1_samples_scenes.jsonl").write_text(
        json.dumps({"doc_id": 0, "filtered_resps": "yes", "accuracy": 1.0}) + "\n"
    )
    return subprocess.CompletedProcess(command, 0)


def test_releases_that_stop_lmms_eval_are_told_before_the_work(monkeypatch, tmp_path, capsys, bundled):
    said = "lmms-eval 0.7.3 imports filelock._api, which filelock 4.3.1 does not have: pip install 'filelock<4'"
    monkeypatch.setattr(errors, "conflicts", lambda: [said])
    assert (
        refused(capsys, "--tasks", "scenes", "--samples", "1", "--results", str(tmp_path / "r"))
        == f"vtprune: error: {said}"
    )
    assert not (tmp_path / "r").exists()
    assert main.main(["eval", "--export", str(tmp_path / "tasks"), "--samples", "1"]) == 0  # needs no lmms-eval
    with pytest.raises(vtprune.VtpruneError, match="filelock<4"):
        plugin(bundled)
    with pytest.raises(SystemExit) as end:  # as under python -m lmms_eval, which would end with code 0
        Chat(loaded=bundled, device="cpu")
    assert end.value.code == f"vtprune: refused: {said}"


def test_eval_runs_once_and_tells_refusals(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "500")  # so that no note is wrapped
    calls = []
    monkeypatch.setattr(one.subprocess, "run", lambda *a, **k: calls.append(a) or finished(*a, **k))
    words = [
        "--tasks",
        "scenes",
        "--samples",
        "1",
        "--recipes",
        "fastv,tome",
        "--no-baselines",
        "--budgets",
        "0.5,0.25",
        "--results",
        str(tmp_path),
    ]
    assert main.main(["eval", *words]) == 0
    table = capsys.readouterr().out
    assert (
        "not possible: fastv cannot do that" in table
        and "36.0" in table
        and table.count("tome") == 2
        and len(calls) == 4
    )
    assert main.main(["eval", *words, "--json"]) == 0 and len(calls) == 6  # refusals are tried again, results are not
    result = json.loads(capsys.readouterr().out)
    assert [r.get("scores", {}).get("scenes") for r in result["rows"]] == [
        None,
        None,
        {"accuracy": 0.5},
        {"accuracy": 0.5},
    ]
    run = json.loads((tmp_path / "runs" / "lmms-tome-effe0.5-0.json").read_text())
    assert (
        run["answers"]["scenes"] == [{"doc_id": 0, "answer": "yes", "accuracy": 1.0}]
        and run["versions"]["lmms_eval"] == "0"
    )
    assert "made with limit None" in refused(capsys, *words, "--limit", "3")


def test_eval_does_not_believe_lmms_evals_exit_code(monkeypatch, tmp_path, capsys):
    def broken(command, env, stdout, **kwargs):
        stdout.write(b"... Error during evaluation: something broke\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(one.subprocess, "run", broken)
    left = tmp_path / "runs" / "lmms-pyramiddrop-own-0" / "model"
    left.mkdir(parents=True)
    (left / "1_results.json").write_text('{"results": {}}')
    (tmp_path / "runs" / "lmms-pyramiddrop-own-0.costs.json").write_text("{}")
    told = refused(capsys, "--tasks", "scenes", "--samples", "1", "--no-baselines", "--results", str(tmp_path))
    assert "something broke" in told and "finished runs are kept" in told


def test_eval_says_what_is_wrong(capsys, tmp_path):
    out = ["--results", str(tmp_path / "r")]
    assert "nope" in refused(capsys, "--recipes", "nope", *out)
    assert "no option" in refused(capsys, "--recipes", "fastv", "--option", "x=1", *out)
    assert "not allowed with" in refused(capsys, "--keep", "3", "--budgets", "0.5", *out)
    (tmp_path / "mine").mkdir()
    assert "--export" in refused(capsys, "--tasks", "scenes", "--include-path", str(tmp_path / "mine"), *out)
    assert "names nothing" in refused(capsys, "--tasks", ",", *out)
    (tmp_path / "a,b").mkdir()
    assert "no such model folder" in refused(capsys, "--model", "a,b", *out)
    assert main.main(["eval", "--list-suites"]) == 0 and "mmvet" in capsys.readouterr().out
    out = ["--results", str(tmp_path / "dry")]
    words = [
        "--dry-run",
        "--recipes",
        "pyramiddrop",
        "--option",
        "layers=[4,8]",
        "--processes",
        "2",
        "--system-prompt",
        "a, b",
    ]
    assert main.main(["eval", *words, *out]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split("recipe=")[1].split(",")[0] for line in lines}
    assert names == {"dense", "pyramiddrop"} and 'system_prompt="a, b"' in lines[0]
    assert (
        all(line.startswith("ACCELERATE_USE_CPU=true") and "--nproc_per_node 2" in line for line in lines)
        and "layers=4+8" in lines[1]
    )
    for budget in (["--keep", "36,0.5,36"], ["--budgets", "0.25,0.5"]):
        assert main.main(["eval", "--dry-run", "--recipe", "fastv", "--seeds", "2", *budget, *out]) == 0
        lines = capsys.readouterr().out.splitlines()
        names = [line.split("recipe=")[1].split(",")[0] for line in lines]
        assert (
            {*names} == {"dense", "fastv", *bench.baselines()}
            and names.count("random") == 4
            and names.count("fastv") == 2
        )
    assert not (tmp_path / "dry").exists()


@pytest.mark.slow  # test_readme.py runs the README's commands
def test_eval_end_to_end(tmp_path, bundled):
    """One real run through the command, and its answers are the benchmark's."""
    words = [
        "eval",
        "--tasks",
        "scenes",
        "--samples",
        "1",
        "--recipes",
        "flowcut",
        "--no-baselines",
        "--budgets",
        "0.25",
        "--batch",
        "4",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "vtprune", *words, "--results", "r"],
        cwd=tmp_path,
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "r" / "runs" / "lmms-flowcut-effe0.25-0.json").read_text())
    expected = run_module.evaluate(*bundled, samples.scenes_samples(1), "flowcut", effective_tokens=0.25)
    assert [a["answer"] for a in run["answers"]["scenes"]] == expected["answers"]
    assert (
        run["row"]["costs"]["effective_tokens"] == pytest.approx(expected["effective_tokens"])
        and run["row"]["costs"]["failed"] == 0
    )
