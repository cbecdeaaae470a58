"""``vtprune serve --engine vllm``, asked over HTTP."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from PIL import Image
from surroundings import ENVIRONMENT

import vtprune
from vtprune.inputs.chats import prepare
from vtprune.serving.openai import content

QUESTION = "what color is the circle ?"


def picture(seed: int = 0) -> Image.Image:
    numbers = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(168, 168, 3, generator=numbers) * 255).byte().numpy())


def part(image: Image.Image) -> dict:
    out = io.BytesIO()
    image.save(out, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()},
    }


@pytest.fixture(scope="module")
def demo():
    return vtprune.load_demo_model()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vtprune", "serve", "--engine", "vllm", "--recipe", "divprune", "--keep", "36"),
        *("--port", str(port), "--", "--max-model-len", "512", "--enforce-eager", "--enable-mm-embeds"),
        *("--trust-request-mm-kwargs", "--gpu-memory-utilization", "0.3"),  # of the machine's memory, on a CPU
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        running = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out, start_new_session=True)
    for _ in range(400):
        assert running.poll() is None, log.read_text(encoding="utf-8")[-3000:]
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                break
        except httpx.HTTPError:
            time.sleep(1)
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) in (0, -signal.SIGTERM)
    os.killpg(running.pid, signal.SIGKILL) if running.poll() is None else None


def ask(client: openai.OpenAI, parts: list[dict], **more):
    return client.chat.completions.create(
        model="vtprune-demo",
        messages=[{"role": "user", "content": parts}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        **more,
    )


def words(answer) -> list[str]:
    return [t.token for t in answer.choices[0].logprobs.content]


def attached(demo, image: Image.Image, keep) -> list[str]:
    model, processor = demo
    inputs = dict(prepare(processor, [image], [QUESTION]))
    with vtprune.attach(model, "divprune", keep=keep):
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return [processor.tokenizer.decode([t]) for t in out.tolist()]


def text(question: str = QUESTION) -> dict:
    return {"type": "text", "text": question}


def test_pictures_text_budgets_and_streams(served, demo):
    answer = ask(served, [part(picture()), text()])
    assert words(answer)[:5] == attached(demo, picture(), 36)[:5] and answer.usage.prompt_tokens < 60
    fewer = ask(served, [part(picture()), text()], extra_body={"mm_processor_kwargs": {"vtprune": {"keep": 9}}})
    assert fewer.usage.prompt_tokens == answer.usage.prompt_tokens - 27
    assert words(fewer)[:5] == attached(demo, picture(), 9)[:5]
    assert ask(served, [text()]).usage.prompt_tokens == answer.usage.prompt_tokens - 36
    chunks = list(
        served.chat.completions.create(
            model="vtprune-demo",
            messages=[{"role": "user", "content": [part(picture()), text()]}],
            max_tokens=6,
            temperature=0,
            stream=True,
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.choices[0].message.content


def test_users_at_once_get_their_own_answers(served, demo):
    alone = {seed: attached(demo, picture(seed), 36) for seed in range(4)}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: words(ask(served, [part(picture(n % 4)), text()])), range(16)))
    assert all(got[:5] == alone[n % 4][:5] for n, got in enumerate(answers))


def test_images_that_were_encoded_elsewhere(served, demo):
    model, processor = demo
    encoded = vtprune.encode(model, "mmtok", dict(prepare(processor, [picture()], [QUESTION])), keep=20)
    with vtprune.attach(model, "mmtok", keep=20):
        inputs = dict(prepare(processor, [picture()], [QUESTION]))
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = ask(served, content(encoded, QUESTION, placed=True))
    assert words(answer)[:5] == [processor.tokenizer.decode([t]) for t in out.tolist()][:5]
    with pytest.raises(openai.BadRequestError, match="hidden dimension"):
        ask(served, content(encoded, QUESTION))


@pytest.mark.parametrize("keep", [145, 0, -1, "many", [3]])
def test_bad_budgets_are_the_client_s_error_and_the_server_goes_on(served, keep):
    with pytest.raises(openai.BadRequestError, match="keep"):
        ask(served, [part(picture()), text()], extra_body={"mm_processor_kwargs": {"vtprune": {"keep": keep}}})
    assert words(ask(served, [part(picture()), text()]))
