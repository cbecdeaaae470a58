"""The page's own script: it asks whether the model's process still lives, and tells when it has ended and is back."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from .worker import Worker

POLL = 2  # seconds between two questions of the page whether the model's process still lives
STATE = "/vtprune-state"
WATCH = """
(() => {
  let box = null, ill = false;
  const tell = (text) => {
    if (box && box.firstChild.textContent === text) return;
    box?.remove();
    box = document.createElement("div");
    box.className = "vtp-ended";
    box.setAttribute("role", "alert");
    const close = document.createElement("button");
    close.type = "button";
    close.textContent = "\\u00d7";
    close.setAttribute("aria-label", "Dismiss this message");
    close.onclick = () => { box.hidden = true; };
    box.append(Object.assign(document.createElement("span"), { textContent: text }), close);
    document.body.prepend(box);
  };
  // a list of choices filters by what is typed, which is to replace what is there
  addEventListener("focusin", (e) => { if (e.target.closest?.("#sides") && e.target.select) e.target.select(); });
  // what gradio leaves without a name for screen readers, or with one that says something else
  const name = () => {
    document.querySelectorAll("#samples button").forEach((b, i) => b.setAttribute("aria-label", `Sample ${i + 1}`));
    document.querySelectorAll("button.upload-container[aria-label]").forEach((b) => b.removeAttribute("aria-label"));
    for (const head of document.querySelectorAll(".toast-header[role]"))
      for (const what of ["role", "tabindex"]) head.removeAttribute(what);
  };
  let due = 0;
  const soon = () => { due ||= setTimeout(() => { due = 0; name(); }, 200); };
  new MutationObserver(soon).observe(document, { subtree: true, childList: true });
  const timer = setInterval(async () => {
    let text = "vtprune demo has ended; start it again and reload this page";
    try { text = await (await fetch("PATH")).text(); } catch (e) { clearInterval(timer); }
    if (text) tell(text);
    else if (ill) tell("the model is loaded again; ask again");
    ill = Boolean(text);
  }, EVERY);
})();
""".replace("PATH", f".{STATE}").replace("EVERY", str(1000 * POLL))


def route(worker: Worker) -> Route:
    """Answers with what is wrong with the process; with nothing while all is well."""

    async def state(request: Request) -> PlainTextResponse:
        return PlainTextResponse(worker.state(), headers={"cache-control": "no-store"})

    return Route(STATE, state)
