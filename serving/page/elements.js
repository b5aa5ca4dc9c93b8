// Elements made by calls. Every text becomes a text node: nothing that the server sends is ever read
// as HTML, and the page's Content-Security-Policy has the browser refuse any attempt.

const SVG = "http://www.w3.org/2000/svg";

/** An element of the page by its id. */
export function byId(id) {
  return document.getElementById(id);
}

/** An HTML element; `attributes` that are null or false are left out, functions listen. */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An SVG element. */
export function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Set a text, and leave the page alone where it is the same already. */
export function setText(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

/** Offer these values in a `select`, each `[value, text]` or `[group, [[value, text], ...]]`; keeps what is chosen. */
export function setOptions(select, entries) {
  const signature = JSON.stringify(entries);
  if (select.dataset.entries === signature) return;
  select.dataset.entries = signature;
  const chosen = select.value;
  select.replaceChildren(
    ...entries.map(([value, content]) =>
      Array.isArray(content)
        ? element("optgroup", { label: value }, ...content.map(([inner, text]) => element("option", { value: inner }, text)))
        : element("option", { value }, content),
    ),
  );
  const values = [...select.options].map((option) => option.value);
  select.value = values.includes(chosen) ? chosen : values[0] ?? "";
}

/** A share of 0 to 1 as a bar, drawn as long as the share is of its place. */
export function bar(share, className = "") {
  const inner = element("span", {});
  inner.style.inlineSize = `${100 * Math.min(1, Math.max(0, share))}%`;
  return element("span", { class: `bar ${className}`.trim(), "aria-hidden": "true" }, inner);
}
