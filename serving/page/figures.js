// The figures of the whole server, and the charts of all tasks or one: what the server counted while this page was open.

import { Chart } from "./chart.js";
import { byId, element, setText } from "./elements.js";
import { ALL, SPAN_S, WINDOW_S } from "./history.js";
import { amount, clock, count, duration, percent, size } from "./numbers.js";
import { measured } from "./tasks.js";

const TILES = {
  rate: ["requests/s", "answered now, errors among them"],
  latency: ["p95", "19 of 20 requests are answered within this time"],
  errors: ["errors", "since this page was opened"],
  refused: ["refused", "since this page was opened: too much, too late, or a wrong key"],
  waiting: ["waiting", "tokens (pieces of words) in the queue"],
  memory: ["memory", "of the processes that answer, the shared model counted once"],
  replicas: ["replicas", "processes that answer, of those that should"],
};

export class Figures {
  constructor(onAll) {
    this._tiles = Object.fromEntries(Object.keys(TILES).map((name) => [name, element("dd", {})]));
    byId("tiles").append(
      ...Object.entries(TILES).map(([name, [title, note]]) =>
        element("div", { class: "tile" }, element("dt", {}, title), this._tiles[name], element("p", {}, note))),
    );
    setText(byId("figures-window"), `"Now" is the last ${WINDOW_S} seconds.`);
    this._charts = {
      rate: new Chart("Requests per second", "answered, and how many of them with an error", ["all", "errors"], amount),
      latency: new Chart("Latency", "how long 50, 95 and 99 of 100 requests took at most", ["p50", "p95", "p99"], duration),
      parts: new Chart("Where the time goes", "a request's mean: making tokens, waiting, in the network", ["tokens", "waiting", "network"], duration),
    };
    byId("detail-charts").append(...Object.values(this._charts).map((chart) => chart.element));
    byId("detail-all").addEventListener("click", onAll);
    this._refusedAtFirst = null;
  }

  /** Begin anew, with the next sample. */
  clear() {
    this._refusedAtFirst = null;
  }

  /** Say why there are no figures; null: there are. */
  showMissing(reason) {
    byId("figures-body").hidden = reason !== null;
    byId("detail").hidden = reason !== null;
    byId("figures-missing").hidden = reason === null;
    setText(byId("figures-missing"), reason ?? "");
  }

  /** The whole server. */
  showServer(history) {
    const stats = history.latest;
    const now = history.recent(ALL);
    const total = history.total(ALL);
    const refused = Object.values(stats.rejected).reduce((sum, n) => sum + n, 0);
    this._refusedAtFirst = Math.min(this._refusedAtFirst ?? refused, refused);
    this._set("rate", amount(now?.rate ?? NaN));
    this._set("latency", duration(now?.p95 ?? NaN));
    this._set("errors", count(total?.errors ?? 0));
    this._set("refused", count(refused - this._refusedAtFirst));
    this._set("waiting", count(stats.queued_tokens));
    this._set("memory", size(stats.memory_bytes));
    this._set("replicas", `${stats.replicas_ready} of ${stats.replicas}`);
  }

  /** The charts of one task, or with null of all. */
  showDetail(history, info) {
    const name = info?.task ?? ALL;
    setText(byId("detail-title"), name ?? "All tasks");
    byId("detail-all").hidden = name === ALL;
    const opened = Number.isFinite(history.began) ? ` Since this page was opened, or the last ten minutes.` : "";
    setText(byId("detail-about"), `${info?.description || (name === ALL ? "All requests together." : "")}${opened}`);
    this._showFacts(history, info);
    const to = history.ended;
    const from = Math.max(history.began, to - SPAN_S);
    const isThere = name === ALL || Object.hasOwn(history.latest.tasks, name);
    byId("detail-charts").hidden = !isThere;
    byId("detail-missing").hidden = isThere;
    setText(byId("detail-missing"), isThere ? "" : "This task is counted together with others that are asked seldom.");
    const series = history.series(name);
    const of = (...parts) => series.map(([at, found]) => [at, found && parts.map((part) => part(found))]);
    this._charts.rate.show(of((one) => one.rate, (one) => one.errors / one.seconds), from, to);
    this._charts.latency.show(of((one) => one.p50, (one) => one.p95, (one) => one.p99), from, to);
    this._charts.parts.show(of((one) => one.tokenize, (one) => one.queue, (one) => one.forward), from, to);
  }

  _set(tile, text) {
    setText(this._tiles[tile], text);
  }

  _showFacts(history, info) {
    const total = history.total(info?.task ?? ALL);
    const codes = [...(total?.codes ?? [])].filter(([code, n]) => n > 0 && Number(code) >= 400).sort();
    const answered = total && total.requests > 0
      ? [`${count(total.requests - total.errors)} without error`, ...codes.map(([code, n]) => `${count(n)} with status ${code}`)].join(", ")
      : "nothing yet";
    const facts = [];
    if (info) {
      const { value, note } = measured(info);
      facts.push(
        ["version", `${info.version}, published ${info.published_at.slice(0, 10)}`],
        ["labels", info.labels.length > 8 ? `${info.labels.slice(0, 8).join(", ")} and ${info.labels.length - 8} more` : info.labels.join(", ")],
        ["takes", info.takes_pairs ? "pairs of texts" : "single texts"],
        ["keeps", `${percent(info.kept_share)} of the feed-forward neurons`],
        ["measured", value === null ? "nothing" : `${value} ${note}`],
        ["reads", `up to ${count(info.max_tokens)} tokens of a text`],
        ["digest", info.digest.slice(0, 16)],
      );
    }
    facts.push(["answered since opened", answered]);
    if (!info && history.latest.backbone) {
      const { hit = 0, miss = 0 } = history.latest.plan_cache;
      facts.push(["model in memory", `${size(history.latest.backbone.bytes)}, once for all tasks`]);
      if (hit + miss > 0) facts.push(["ready networks found", `${percent(hit / (hit + miss))} of the times one was needed`]);
      facts.push(["machine", history.latest.node], ["newest figures", clock(history.ended)]);
    }
    const place = byId("detail-facts");
    const signature = JSON.stringify(facts);
    if (place.dataset.facts === signature) return;
    place.dataset.facts = signature;
    place.replaceChildren(
      ...facts.map(([term, text]) => element("div", {}, element("dt", {}, term), element("dd", {}, text))));
  }
}
