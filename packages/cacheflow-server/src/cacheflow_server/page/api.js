// Requests to this server: the key, the stream of events, and errors as things that can be shown. It knows no elements.

const KEY = "cacheflow-api-key";
let key = kept();

function kept() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export const hasKey = () => key !== "";

/** Uses a key from now on, and keeps it as long as the tab lives. */
export function useKey(value) {
  key = value.trim();
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Kept by this page only.
  }
}

/** The absolute address of one of this server's routes, also behind a proxy that shows it under a path. */
export const address = (route) => new URL(route, document.baseURI).href;

/** What an answer, or its absence, said. `status` is 0 without an answer; `field` is the request's field that is at fault. */
export class Problem extends Error {
  constructor(message, { status = 0, field = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, field, retryAfter });
  }
}

function problemOf(document, status, retryAfter = null) {
  const error = document?.error ?? {};
  const seconds = Number.parseInt(retryAfter, 10);
  return new Problem(error.message ?? `The server answered with status ${status}.`, {
    status,
    field: error.param ?? null,
    retryAfter: Number.isNaN(seconds) ? null : seconds,
  });
}

async function ask(route, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(address(route), { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server can't be reached.");
  }
  if (response.ok) return response;
  throw problemOf(await response.json().catch(() => null), response.status, response.headers.get("retry-after"));
}

/** The JSON that a route answers with. */
export const read = async (route, signal) => (await ask(route, { signal })).json();

export const GENERATE_HEADERS = { Accept: "text/event-stream", "Content-Type": "application/json" };

/** A name for a request, under which the engine's readings have it, with more behind it. */
export const newRequestId = () => [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Sends `body`, a string, to /generate and yields its answers so far. Each has everything, so that only the last one counts. */
export async function* generate(body, requestId, signal) {
  const headers = { ...GENERATE_HEADERS, "X-Request-Id": requestId };
  const response = await ask("generate", { method: "POST", headers, body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      part = { done: true };
    }
    if (part.done) throw new Problem("The connection was lost before the end. What had come until then is below.");
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const document = JSON.parse(data);
      if (document.error) throw problemOf(document, 500);
      yield document;
    }
  }
}
