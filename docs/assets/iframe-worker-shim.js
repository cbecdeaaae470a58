// Browsers start no workers from files (file://), where the search of this site runs in one: there a hidden frame takes its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.url = new URL(url, document.baseURI).href;
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.title = "search";
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      inner.document.open();
      inner.document.write("<html lang=en><title>search</title><body></body></html>");
      inner.document.close();
      inner.postMessage = data => this.dispatchEvent(Object.assign(new MessageEvent("message", { data })));
      inner.self = inner;
      inner.importScripts = (...urls) => urls.reduce((before, u) => before.then(() => this.load(u)), Promise.resolve());
      this.ready = this.load(this.url);
    }
    load(url) {
      return new Promise((done, failed) => {
        const script = this.frame.contentDocument.createElement("script");
        script.src = new URL(url, this.url);
        script.onload = done;
        script.onerror = failed;
        this.frame.contentDocument.body.append(script);
      });
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() { this.frame.remove(); }
  };
}
