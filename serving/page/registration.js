// Taking in an artifact: dropped or chosen, shown, sent with an admin key, and followed until every replica answers with it.

import { keptShare, readManifest } from "./artifact.js";
import { byId, element, setText } from "./elements.js";
import { percent, size } from "./numbers.js";
import { ServerError } from "./server.js";

const LOOK_MS = 300;
const UPLOAD_MS = 300_000;
const STEPS = {
  verify: "checked: format, backbone, shapes, numbers",
  stage: "loaded and tried with its own examples on every replica",
  publish: "written to the store",
  serve: "answering on every replica",
};

export class Registration {
  /** `ask(method, path, body, key, patienceMs)` asks the server; key null: with the page's own. */
  constructor(ask, onDone) {
    this._ask = ask;
    this._onDone = onDone;
    this._file = null;
    this._isBusy = false;
    const drop = byId("drop");
    byId("file").addEventListener("change", () => this._take(byId("file").files[0]));
    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      this._take(event.dataTransfer.files[0]);
    });
    // A file that misses its place must not replace the page.
    for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());
    byId("registration-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this._register();
    });
  }

  async _take(file) {
    byId("file").value = "";
    if (!file || this._isBusy) return;
    this._file = null;
    byId("registration-form").hidden = true;
    byId("registration-file").replaceChildren();
    byId("registration-progress").replaceChildren();
    setText(byId("registration-error"), "");
    try {
      const manifest = await readManifest(file);
      this._file = { data: file, task: manifest.task };
      this._showFile(file, manifest);
      byId("registration-form").hidden = false;
      byId("admin-key").focus({ preventScroll: true });
    } catch (error) {
      setText(byId("registration-error"), `${file.name}: ${error.message}`);
    }
  }

  _showFile(file, manifest) {
    const labels = Array.isArray(manifest.labels) ? manifest.labels.map(String) : [];
    const facts = [
      ["file", `${file.name}, ${size(file.size)}`],
      ["task", manifest.task],
      ["about", String(manifest.description ?? "")],
      ["labels", labels.length > 8 ? `${labels.slice(0, 8).join(", ")} and ${labels.length - 8} more` : labels.join(", ")],
      ["keeps", `${percent(keptShare(manifest))} of the feed-forward neurons`],
      ["for the model", String(manifest.backbone?.name ?? "")],
    ];
    byId("registration-file").replaceChildren(element("dl", { class: "facts" }, ...facts
      .filter(([, text]) => text !== "")
      .map(([term, text]) => element("div", {}, element("dt", {}, term), element("dd", {}, text)))));
  }

  async _register() {
    if (this._isBusy || this._file === null) return;
    this._isBusy = true;
    const button = byId("registration-form").querySelector("button");
    button.disabled = true;
    setText(byId("registration-error"), "");
    const key = byId("admin-key").value.trim() || null;
    const { data, task } = this._file;
    const activate = byId("registration-activate").checked;
    try {
      this._showProgress({ state: "sending" }, activate);
      const path = `v1/tasks/${encodeURIComponent(task)}/versions?wait=false&activate=${activate}`;
      let operation = await this._ask("POST", path, data, key, UPLOAD_MS);
      while (operation.state === "running") {
        this._showProgress(operation, activate);
        await new Promise((done) => setTimeout(done, LOOK_MS));
        operation = await this._look(operation, key);
      }
      this._showProgress(operation, activate);
      if (operation.error) setText(byId("registration-error"), `It was not taken in. ${operation.error.message}`);
      else this._onDone(operation);
    } catch (error) {
      byId("registration-progress").replaceChildren();
      setText(byId("registration-error"), inWords(error));
    } finally {
      this._isBusy = false;
      button.disabled = false;
    }
  }

  /** How far the operation is; an answer that did not come is asked for again. */
  async _look(operation, key) {
    try {
      return await this._ask("GET", `v1/operations/${encodeURIComponent(operation.operation)}`, null, key);
    } catch (error) {
      if (error instanceof ServerError && error.isGone) return operation;
      throw error;
    }
  }

  _showProgress(operation, activate) {
    const names = Object.keys(STEPS).filter((name) => activate || !["publish", "serve"].includes(name));
    const isDone = operation.state === "done";
    const reached = operation.state === "sending" ? -1 : names.indexOf(operation.step);
    const items = names.map((name, number) => {
      const isPast = isDone || number < reached;
      const isHere = !isDone && number === reached;
      const state = isPast ? "done" : isHere ? (operation.state === "failed" ? "failed" : "running") : "waiting";
      const words = { done: "done", failed: "failed", running: "under way", waiting: "not yet" }[state];
      const ready = isHere && operation.replicas > 0 ? ` (${operation.ready} of ${operation.replicas} replicas)` : "";
      return element("li", { class: state }, element("span", { class: "mark" }, words), `${STEPS[name]}${ready}`);
    });
    let summary = operation.state === "sending" ? "Sending the file." : "";
    if (isDone && operation.created) summary = `${operation.task}, version ${operation.version}, ${activate ? "answers now" : "is in the store"}.`;
    if (isDone && !operation.created) summary = `This very file is there already: ${operation.task}, version ${operation.version}${activate ? ", answers" : ""}.`;
    byId("registration-progress").replaceChildren(
      element("p", { class: "summary" }, summary), element("ol", { class: "steps" }, ...items));
  }
}

function inWords(error) {
  if (error.status === 401) return `This key is not known here. ${error.message}`;
  if (error.status === 403) return `This key may not change what is served. ${error.message}`;
  return error.message;
}
