// The key that this page was opened with: where it comes from, and where it is kept.
//
// `/#token=...` gives it: what stands behind `#` is never sent to a server. It is taken out of the address bar at once.

const NAME = "taskbone.key";

/** The key in the address, if there is one; taken out of it. */
export function takeFromAddress() {
  const found = /^#token=(.+)$/.exec(location.hash);
  if (!found) return null;
  history.replaceState(null, "", location.pathname + location.search);
  try {
    return decodeURIComponent(found[1]);
  } catch {
    return found[1];
  }
}

/** The key that is kept in this tab or on this device; null where none is. */
export function kept() {
  return stored(() => sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME)) ?? null;
}

/** Keep a key until the tab is closed, or on this device. */
export function keep(key, onDevice) {
  forget();
  stored(() => (onDevice ? localStorage : sessionStorage).setItem(NAME, key));
}

/** Keep none any more. */
export function forget() {
  stored(() => sessionStorage.removeItem(NAME));
  stored(() => localStorage.removeItem(NAME));
}

// A browser may forbid storage; then the key holds until the page is loaded again.
function stored(action) {
  try {
    return action();
  } catch {
    return null;
  }
}
