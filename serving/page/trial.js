// The box to try a text, or a pair of texts, on one task or on all that take such inputs.

import { bar, byId, element, setOptions, setText } from "./elements.js";
import { amount, percent } from "./numbers.js";

const ALL_TEXTS = "*text", ALL_PAIRS = "*pair";
const EXAMPLE = "A warm, funny film that I did not want to end.";
const EXAMPLE_PAIR = ["The shop in Oak Street opened on Friday with music.", "A shop opened in Oak Street."];
const SHOWN_LABELS = 4;

export class Trial {
  /** `ask(method, path, body)` asks the server with the page's key. */
  constructor(ask) {
    this._ask = ask;
    this._infos = new Map();
    this._examples = { text: [EXAMPLE, ""], pair: EXAMPLE_PAIR };
    this._kind = null;
    byId("trial-task").addEventListener("change", () => this._adapt());
    byId("trial-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this._submit();
    });
    for (const id of ["trial-first", "trial-second"]) {
      byId(id).addEventListener("keydown", (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("trial-form").requestSubmit();
      });
    }
  }

  /** Offer these tasks. */
  show(infos) {
    this._infos = new Map(infos.map((info) => [info.task, info]));
    const texts = infos.filter((info) => !info.takes_pairs);
    const pairs = infos.filter((info) => info.takes_pairs);
    const entries = [];
    if (texts.length > 0) entries.push([ALL_TEXTS, `all that take a text (${texts.length})`]);
    if (pairs.length > 0) entries.push([ALL_PAIRS, `all that compare two texts (${pairs.length})`]);
    if (texts.length > 0) entries.push(["on a text", texts.map((info) => [info.task, info.task])]);
    if (pairs.length > 0) entries.push(["on a pair of texts", pairs.map((info) => [info.task, info.task])]);
    setOptions(byId("trial-task"), entries);
    byId("trial").hidden = infos.length === 0;
    this._adapt();
  }

  get _takesPairs() {
    const chosen = byId("trial-task").value;
    return chosen === ALL_PAIRS || Boolean(this._infos.get(chosen)?.takes_pairs);
  }

  _adapt() {
    const info = this._infos.get(byId("trial-task").value);
    const kind = this._takesPairs ? "pair" : "text";
    byId("trial-second-field").hidden = kind === "text";
    setText(byId("trial-first-label"), kind === "pair" ? "First text" : "Text");
    setText(byId("trial-about"), info?.description ?? "All of them answer as one batch.");
    if (kind === this._kind) return;
    // Whoever goes back to the other kind finds what stood there.
    if (this._kind !== null) this._examples[this._kind] = this._texts();
    this._kind = kind;
    [byId("trial-first").value, byId("trial-second").value] = this._examples[kind];
  }

  _texts() {
    return [byId("trial-first").value, byId("trial-second").value];
  }

  async _submit() {
    const chosen = byId("trial-task").value;
    const [first, second] = this._texts();
    const inputs = this._takesPairs ? [[first, second]] : first;
    const isAll = chosen === ALL_TEXTS || chosen === ALL_PAIRS;
    const button = byId("trial-form").querySelector("button");
    button.disabled = true;
    setText(byId("trial-error"), "");
    try {
      const found = isAll
        ? await this._ask("POST", "v1/predict", { tasks: "*", inputs })
        : await this._ask("POST", `v1/tasks/${encodeURIComponent(chosen)}/predict`, { inputs });
      this._showAnswers(isAll ? Object.entries(found.results) : [[chosen, found]], found.timings_ms);
    } catch (error) {
      byId("trial-answers").replaceChildren();
      setText(byId("trial-timings"), "");
      setText(byId("trial-error"), error.message);
    } finally {
      button.disabled = false;
    }
  }

  _showAnswers(results, timings) {
    byId("trial-answers").replaceChildren(...results.map(([task, result]) => answerOf(task, result)));
    setText(byId("trial-timings"),
      `Answered in ${amount(timings.total_ms)} ms: ${amount(timings.tokenize_ms)} ms to cut the text into tokens, `
      + `${amount(timings.queue_ms)} ms of waiting, ${amount(timings.forward_ms)} ms in the network.`);
  }
}

function answerOf(task, result) {
  if (result.error) {
    return element("div", { class: "answer" },
      element("h3", {}, task), element("p", { class: "error" }, result.error.message));
  }
  const [prediction] = result.predictions;
  const scores = Object.entries(prediction.scores).sort((a, b) => b[1] - a[1]);
  const left = scores.length - SHOWN_LABELS;
  return element(
    "div", { class: "answer" },
    element("h3", {}, task, " ", element("small", {}, `version ${result.version}`)),
    element("p", { class: "label" }, prediction.label),
    element("ul", { class: "scores" }, ...scores.slice(0, SHOWN_LABELS).map(([label, score], number) => element(
      "li", {}, element("span", { class: "name", title: label }, label), bar(score, number === 0 ? "best" : ""),
      element("span", { class: "share" }, percent(score, 1))))),
    left > 0 ? element("p", { class: "note" }, `and ${left} more labels`) : null,
  );
}
