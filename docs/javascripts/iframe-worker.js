// Lets the search run when the site is opened from disk, where browsers refuse workers: their script runs in a hidden frame.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const waiting = [];
      const frame = document.createElement("iframe");
      const send = (data) => frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
      this.postMessage = (data) => waiting.push(data);
      frame.hidden = true;
      frame.addEventListener("load", () => {
        frame.contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        const script = frame.contentDocument.createElement("script");
        script.src = url;
        script.addEventListener("load", () => {
          this.postMessage = send;
          waiting.forEach(send);
        });
        script.addEventListener("error", () => this.dispatchEvent(new Event("error")));
        frame.contentDocument.body.append(script);
      }, { once: true });
      document.body.append(frame);
    }

    terminate() {}
  };
  window.Worker = window.IFrameWorker;
}
