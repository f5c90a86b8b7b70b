// A browser starts no Worker from a page on the disk. There the search runs in a hidden frame, which is sent the same
// messages and gives the same answers.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = "<!doctype html><title>search</title>";
      this.ready = new Promise((resolve) => this.frame.addEventListener("load", resolve, { once: true })).then(() => {
        const inside = this.frame.contentWindow;
        inside.importScripts = async (...sources) => {
          for (const source of sources) await this.load(source);
        };
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        return this.load(new URL(url, document.baseURI).href);
      });
      document.body.append(this.frame);
    }

    load(source) {
      return new Promise((resolve, reject) => {
        const script = this.frame.contentDocument.createElement("script");
        script.addEventListener("load", resolve);
        script.addEventListener("error", () => reject(new Error(`cannot load ${source}`)));
        script.src = source;
        this.frame.contentDocument.body.append(script);
      });
    }

    async postMessage(data) {
      await this.ready;
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      this.frame.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
