// What an artifact says of itself: the manifest in a safetensors file's header. Nothing is checked here but what is
// needed to show it; the server checks everything.

const MAX_HEADER_BYTES = 4 << 20;

/** The manifest of a file, or an `Error` that says in words why there is none. */
export async function readManifest(file) {
  const start = new DataView(await file.slice(0, 8).arrayBuffer());
  const length = start.byteLength === 8 ? Number(start.getBigUint64(0, true)) : 0;
  if (length < 2 || length > MAX_HEADER_BYTES || length > file.size - 8) {
    throw new Error("This is no artifact: the file does not start with a safetensors header.");
  }
  let manifest;
  try {
    const header = JSON.parse(await file.slice(8, 8 + length).text());
    manifest = JSON.parse(header.__metadata__.taskbone);
  } catch {
    throw new Error("This is no artifact: its header has no Taskbone manifest. It may be a model; a task's file is made with: taskbone localize");
  }
  if (typeof manifest?.task !== "string" || manifest.task === "") {
    throw new Error("This is no artifact: its manifest names no task.");
  }
  return manifest;
}

/** Share of all feed-forward neurons that a manifest says are kept; NaN where it does not say so. */
export function keptShare(manifest) {
  const kept = Array.isArray(manifest.ffn_kept) ? manifest.ffn_kept : [];
  return kept.reduce((sum, layer) => sum + layer, 0) / (manifest.ffn_width * kept.length);
}
