// The table of tasks: what each is, and what the server counted of it. A row's button shows more of the task.

import { sparkline } from "./chart.js";
import { bar, byId, element, setText } from "./elements.js";
import { SPAN_S } from "./history.js";
import { amount, count, duration, percent, size } from "./numbers.js";

const METRICS = { accuracy: "accuracy", macro_f1: "macro F1", matthews: "Matthews' correlation" };
const MANY = 8;

/** Columns: name, class, how rows are compared (null: by name), whether it needs figures. */
const COLUMNS = [
  ["task", "name", (row) => row.info.task, false],
  ["version", "minor number", (row) => row.info.version, false],
  ["kept", "medium apart", (row) => row.info.kept_share, false],
  ["accuracy", "medium number", (row) => row.measured.order, false],
  ["requests/s", "apart", (row) => row.now?.rate ?? -1, true],
  ["p50", "number medium", (row) => row.now?.p50 ?? -1, true],
  ["p95", "number", (row) => row.now?.p95 ?? -1, true],
  ["p99", "number medium", (row) => row.now?.p99 ?? -1, true],
  ["errors", "number", (row) => row.total?.errors ?? -1, true],
  ["memory", "number minor", (row) => row.bytes, false],
];

/** What was measured of a task when it was made: a text, what it is, and a number to sort by. */
export function measured(info) {
  const ranks = { recovered: 0, localized: 1, dense: 2 };
  const found = [...info.metrics]
    .filter((one) => one.network !== "dense")
    .sort((a, b) => (a.split === b.split ? ranks[a.network] - ranks[b.network] : a.split === "test" ? -1 : 1));
  const best = found.find((one) => one.metric === "accuracy") ?? found[0];
  if (!best) return { value: null, note: "", order: -1, metric: "" };
  const value = best.metric === "accuracy" ? percent(best.value, 1) : best.value.toFixed(3);
  const whole = info.metrics.find((one) => one.network === "dense" && one.split === best.split && one.metric === best.metric);
  const versus = whole ? `; with all neurons and the prompt alone ${best.metric === "accuracy" ? percent(whole.value, 1) : whole.value.toFixed(3)}` : "";
  const note = `${METRICS[best.metric]} on ${count(best.rows)} ${best.split} rows${versus}`;
  return { value, note, order: best.value, metric: METRICS[best.metric] };
}

export class Tasks {
  constructor(onSelect) {
    this._onSelect = onSelect;
    this._sorted = { column: 0, isDown: false };
    this._hasFigures = null;
    this._rows = new Map();
    this._shown = [];
    this._body = element("tbody", {});
    byId("tasks-filter").addEventListener("input", () => this._arrange());
  }

  /** Show the tasks; `history` null: without figures. `selected`: the name of the one whose details are shown. */
  show(infos, history, selected) {
    const hasFigures = history !== null;
    if (hasFigures !== this._hasFigures) this._build(hasFigures);
    byId("tasks-filter-field").hidden = infos.length <= MANY;
    byId("tasks-empty").hidden = infos.length > 0;
    byId("tasks-table").hidden = infos.length === 0;
    setText(byId("tasks-empty"), "No task is served yet. Make one with taskbone localize and publish it with taskbone store publish, or drop its artifact below.");
    const names = new Set(infos.map((info) => info.task));
    for (const name of [...this._rows.keys()]) {
      if (!names.has(name)) this._drop(name);
    }
    for (const info of infos) this._fill(info, history, selected);
    this._arrange();
  }

  _build(hasFigures) {
    this._hasFigures = hasFigures;
    this._columns = COLUMNS.filter(([, , , needs]) => hasFigures || !needs);
    this._heads = this._columns.map(([name, kind], number) => element(
      "th", { scope: "col", class: kind }, element("button", { type: "button", click: () => this._sortBy(number) }, name)));
    for (const row of this._rows.values()) row.element.remove();
    this._rows.clear();
    this._shown = [];
    byId("tasks-table").replaceChildren(
      element("table", {}, element("caption", { class: "covert" }, "The tasks that are served"),
        element("thead", {}, element("tr", {}, ...this._heads)), this._body));
  }

  _drop(name) {
    this._rows.get(name).element.remove();
    this._rows.delete(name);
  }

  _fill(info, history, selected) {
    let row = this._rows.get(info.task);
    if (!row) {
      row = this._newRow(info.task);
      this._rows.set(info.task, row);
    }
    row.info = info;
    row.measured = measured(info);
    const isCounted = history && Object.hasOwn(history.latest.tasks, info.task);
    row.now = isCounted ? history.recent(info.task) : null;
    row.total = isCounted ? history.total(info.task) : null;
    row.bytes = isCounted ? history.latest.tasks[info.task].overlay_bytes : info.bytes;
    row.button.setAttribute("aria-pressed", String(info.task === selected));
    row.element.classList.toggle("selected", info.task === selected);
    setText(row.about, info.description);
    this._texts(row);
    if (isCounted) this._spark(row, history);
  }

  _texts(row) {
    const { info, now, total, cells } = row;
    const notes = [info.canary && `canary ${info.canary.version}: ${amount(info.canary.percent)} %`, info.shadow && `shadow ${info.shadow}`];
    cells.version.replaceChildren(String(info.version), ...notes.filter(Boolean).map((note) => element("small", {}, note)));
    if (row.keptShare !== info.kept_share) cells.kept.replaceChildren(percent(info.kept_share), bar(info.kept_share));
    row.keptShare = info.kept_share;
    const isPlain = row.measured.metric === "accuracy" || row.measured.value === null;
    cells.accuracy.replaceChildren(row.measured.value ?? "\u2013", isPlain ? "" : element("small", {}, row.measured.metric));
    cells.accuracy.title = row.measured.note;
    setText(cells.memory, size(row.bytes));
    if (!this._hasFigures) return;
    setText(row.rate, amount(now?.rate ?? NaN));
    for (const name of ["p50", "p95", "p99"]) setText(cells[name], duration(now?.[name] ?? NaN));
    setText(cells.errors, total ? count(total.errors) : "\u2013");
    cells.errors.classList.toggle("bad", (total?.errors ?? 0) > 0);
    cells.errors.title = [...(total?.codes ?? [])].filter(([code, n]) => Number(code) >= 400 && n > 0).map(([code, n]) => `${count(n)} with status ${code}`).join(", ");
  }

  _spark(row, history) {
    const points = history.rates(row.info.task).map(([at, rate]) => [at, rate === null ? null : [rate]]);
    row.spark.replaceChildren(sparkline(points, Math.max(history.began, history.ended - SPAN_S), history.ended));
  }

  _newRow(name) {
    const about = element("small", { class: "about" });
    const button = element("button", { type: "button", class: "link", click: () => this._onSelect(name) }, name);
    const rate = element("span", { class: "rate" }), spark = element("span", {});
    const cells = {};
    const made = this._columns.map(([column, kind]) => {
      if (column === "task") return element("th", { scope: "row", class: kind }, button, about);
      cells[column] = element("td", { class: kind });
      if (column === "requests/s") cells[column].append(rate, spark);
      return cells[column];
    });
    return { element: element("tr", {}, ...made), button, about, cells, rate, spark };
  }

  _sortBy(column) {
    this._sorted = { column, isDown: this._sorted.column === column ? !this._sorted.isDown : column > 0 };
    this._arrange();
  }

  /** Rows in order, those that the filter leaves; what stands right is not moved, so that it keeps the focus. */
  _arrange() {
    const { column, isDown } = this._sorted;
    const value = (this._columns[column] ?? this._columns[0])[2];
    const sought = byId("tasks-filter-field").hidden ? "" : byId("tasks-filter").value.trim().toLowerCase();
    const rows = [...this._rows.values()].filter(({ info }) =>
      `${info.task} ${info.description}`.toLowerCase().includes(sought));
    rows.sort((a, b) => {
      const [one, two] = [value(a), value(b)].map((found) => (Number.isNaN(found) ? -1 : found));
      const order = one < two ? -1 : one > two ? 1 : 0;
      return (isDown ? -order : order) || (a.info.task < b.info.task ? -1 : 1);
    });
    this._heads.forEach((head, number) =>
      number === column ? head.setAttribute("aria-sort", isDown ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
    const elements = rows.map((row) => row.element);
    if (elements.length === this._shown.length && elements.every((one, number) => one === this._shown[number])) return;
    this._shown = elements;
    const focused = document.activeElement;
    this._body.replaceChildren(...elements);
    if (this._body.contains(focused)) focused.focus({ preventScroll: true });
  }
}
