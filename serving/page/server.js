// Asking the server: one function, and its errors in words. All addresses are relative, so that the page also works
// behind a proxy that serves it below another path.

const PATIENCE_MS = 15_000;

/** What went wrong. `status` 0: no answer came. */
export class ServerError extends Error {
  constructor(status, type, message) {
    super(message);
    this.status = status;
    this.type = type;
  }

  /** Whether nobody answers, so that trying again may help. */
  get isGone() {
    return this.status === 0 || (this.status >= 502 && this.type !== "overloaded" && this.type !== "deadline_exceeded");
  }
}

/** One request; gives the answer's JSON. `body`: an object, or a file as it is. `key` null: none is shown. */
export async function ask(method, path, { key = null, body = null, patienceMs = PATIENCE_MS } = {}) {
  const headers = {};
  if (key !== null) {
    if (!/^[\x21-\x7e]+$/.test(key)) throw new ServerError(401, "unauthorized", "It has characters that no key has.");
    headers.authorization = `Bearer ${key}`;
  }
  let sent = null;
  if (body instanceof Blob) sent = body;
  else if (body !== null) {
    sent = JSON.stringify(body);
    headers["content-type"] = "application/json";
  }
  let answer;
  let text;
  try {
    const signal = AbortSignal.timeout(patienceMs);
    answer = await fetch(path, { method, headers, body: sent, signal, cache: "no-store", credentials: "omit" });
    text = await answer.text();
  } catch (error) {
    const late = error.name === "TimeoutError";
    throw new ServerError(0, "gone", late ? "The server did not answer in time." : "The server does not answer.");
  }
  const json = parsed(text);
  if (answer.ok && json !== null) return json;
  const { type = "unknown", message = `The server answered ${answer.status}.` } = json?.error ?? {};
  throw new ServerError(answer.status, String(type), String(message));
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
