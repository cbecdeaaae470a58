"""Every open page asks whether the model's process still lives, and tells when it has ended."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from .worker import Worker

POLL = 2  # seconds between two questions of the page whether the model's process still lives
STATE = "/vtprune-state"
WATCH = """
(() => {
  const tell = (text) => {
    let box = document.querySelector(".vtp-ended");
    if (!box) {
      box = document.createElement("div");
      box.className = "vtp-ended";
      box.setAttribute("role", "alert");
      document.body.prepend(box);
    }
    box.textContent = text;
  };
  const timer = setInterval(async () => {
    let text = "vtprune demo has ended; start it again and reload this page";
    try { text = await (await fetch("PATH")).text(); } catch (e) { clearInterval(timer); }
    if (text) tell(text);
  }, EVERY);
})();
""".replace("PATH", f".{STATE}").replace("EVERY", str(1000 * POLL))


def route(worker: Worker) -> Route:
    """Answers with why the process has ended; with nothing while it lives."""

    async def state(request: Request) -> PlainTextResponse:
        return PlainTextResponse(worker.state(), headers={"cache-control": "no-store"})

    return Route(STATE, state)
