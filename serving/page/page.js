// The page as a whole: gets in with a key, asks the server every two seconds while somebody looks, and hands what it
// says to the parts. Everything shown comes from routes that need the key.

import { byId, setText } from "./elements.js";
import { Figures } from "./figures.js";
import { History } from "./history.js";
import * as keys from "./key.js";
import { Neurons } from "./neurons.js";
import { clock } from "./numbers.js";
import { Registration } from "./registration.js";
import { ServerError, ask } from "./server.js";
import { Tasks } from "./tasks.js";
import { Trial } from "./trial.js";

const LOOK_MS = 2000;

class Page {
  constructor() {
    const asked = (method, path, body = null, key = null, patienceMs = undefined) =>
      ask(method, path, { key: key ?? this._key, body, patienceMs });
    this._key = null;
    this._history = new History();
    this._figures = new Figures(() => this._select(null));
    this._tasks = new Tasks((task) => this._select(task));
    this._trial = new Trial(asked);
    this._neurons = new Neurons(asked);
    new Registration(asked, () => this._look());
    this._infos = [];
    this._selected = null;
    this._lacks = null;
    this._seenAt = NaN;
    this._timer = 0;
    this._round = 0;
    byId("entrance-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const given = byId("key").value.trim();
      keys.keep(given, byId("keep").checked);
      byId("key").value = "";
      this._open(given);
    });
    byId("forget").addEventListener("click", () => {
      keys.forget();
      this._askForKey("");
    });
    byId("docs").addEventListener("click", (event) => this._openDocs(event));
    addEventListener("hashchange", () => this._takeKey());
    document.addEventListener("visibilitychange", () => this._look());
  }

  /** Begin: with the key of the address, a kept one, or none, which some servers do not ask for. */
  start() {
    if (!this._takeKey()) this._open(keys.kept());
  }

  _takeKey() {
    const given = keys.takeFromAddress();
    if (given === null) return false;
    keys.keep(given, false);
    this._open(given);
    return true;
  }

  _open(key) {
    this._key = key;
    this._lacks = null;
    this._history.clear();
    this._figures.clear();
    this._look();
  }

  _askForKey(reason) {
    clearTimeout(this._timer);
    this._round += 1;
    this._key = null;
    this._infos = [];
    this._selected = null;
    byId("content").hidden = true;
    byId("forget").hidden = true;
    byId("docs").hidden = true;
    byId("trouble").hidden = true;
    byId("entrance").hidden = false;
    setText(byId("entrance-error"), reason);
    setText(byId("backbone"), "one frozen encoder, many small tasks");
    this._showState("locked", "a key is needed");
    byId("key").focus();
  }

  /** Ask for everything once, and again in two seconds; never two at a time. */
  async _look() {
    clearTimeout(this._timer);
    this._round += 1;
    const round = this._round;
    if (document.hidden) return;
    try {
      const [{ tasks }, stats] = await Promise.all([ask("GET", "v1/tasks", { key: this._key }), this._stats()]);
      if (round !== this._round) return;
      this._infos = tasks;
      if (stats !== null) this._history.add(stats);
      this._seenAt = Date.now() / 1000;
      this._show();
    } catch (error) {
      if (round !== this._round) return;
      if (!(error instanceof ServerError)) throw error;
      if (error.status === 401 || error.status === 403) {
        const hadKey = this._key !== null;
        keys.forget();
        this._askForKey(hadKey ? inWords(error) : "");
        return;
      }
      this._showTrouble(error);
    }
    this._timer = setTimeout(() => this._look(), LOOK_MS);
  }

  /** The figures, or null where there are none for this key; then they are not asked for again. */
  async _stats() {
    if (this._lacks !== null) return null;
    try {
      return await ask("GET", "v1/stats", { key: this._key });
    } catch (error) {
      if (error.status === 403) this._lacks = "This key does not open figures; it takes one with the scope metrics, made with: taskbone keys add NAME --scope predict --scope metrics";
      else if (error.status === 404) this._lacks = "This server gives no figures.";
      else throw error;
      return null;
    }
  }

  _show() {
    byId("entrance").hidden = true;
    byId("trouble").hidden = true;
    byId("content").hidden = false;
    byId("forget").hidden = this._key === null;
    byId("docs").hidden = false;
    const stats = this._history.latest;
    const history = stats === null ? null : this._history;
    if (!this._infos.some((info) => info.task === this._selected)) this._selected = null;
    this._tasks.show(this._infos, history, this._selected);
    this._trial.show(this._infos);
    this._neurons.show(this._infos);
    this._figures.showMissing(stats === null ? this._lacks : null);
    if (stats === null) {
      this._showState("good", "answering");
      return;
    }
    setText(byId("backbone"), `${stats.backbone.name}, one frozen encoder for ${tasksInWords(this._infos.length)}`);
    const all = stats.replicas_ready >= stats.replicas;
    this._showState(all ? "good" : "partly", all ? "answering" : `answering, ${stats.replicas_ready} of ${stats.replicas} replicas`);
    this._figures.showServer(this._history);
    this._figures.showDetail(this._history, this._infos.find((info) => info.task === this._selected) ?? null);
  }

  _select(task) {
    this._selected = task;
    if (task !== null) this._neurons.choose(task);
    this._show();
    if (task !== null && this._history.latest !== null) byId("detail").scrollIntoView({ block: "nearest" });
  }

  _showTrouble(error) {
    const since = Number.isFinite(this._seenAt) ? ` What you see is from ${clock(this._seenAt)}.` : "";
    byId("trouble").hidden = false;
    setText(byId("trouble"), error.isGone
      ? `The server does not answer. Trying again every two seconds.${since}`
      : `The server answers with an error: ${error.message}${since}`);
    this._showState("bad", error.isGone ? "not answering" : "an error");
  }

  _showState(state, text) {
    byId("state").dataset.state = state;
    setText(byId("state"), text);
  }

  /** The documentation is for who has a key, too: a browser gets in with a cookie, which this asks for. */
  async _openDocs(event) {
    if (this._key === null) return;
    event.preventDefault();
    try {
      await fetch(`docs?token=${encodeURIComponent(this._key)}`, { credentials: "same-origin" });
      location.assign("docs");
    } catch {
      this._look();
    }
  }
}

function tasksInWords(n) {
  return n === 1 ? "one task" : `${n} tasks`;
}

function inWords(error) {
  return error.status === 401
    ? "This key is not known here, or does not hold any more."
    : `This key does not open this page. ${error.message}`;
}

new Page().start();
