/* Calls of the server: answers as events, and whatever goes wrong as one kind of error. */

const PRINTABLE = /^[\x21-\x7e]+$/;

/** A call that was refused or broke off; `message` is for people. */
export class CallError extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** JSON of a GET. */
export async function get(path, key) {
  const response = await call(path, key, {});
  return response.json();
}

/**
 * Events of a streamed answer, each an object, until `[DONE]`.
 * Throws CallError; where `signal` was aborted, what fetch throws.
 */
export async function* ask(path, body, key, signal) {
  const response = await call(path, key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let isDone = false;
  try {
    for await (const data of readEvents(response.body)) {
      isDone ||= data === "[DONE]";
      if (isDone) continue; // to the body's end: whoever leaves before counts as gone
      const event = JSON.parse(data);
      if (event.error) throw new CallError(`The answer broke off: ${told(event)}`, event.error);
      yield event;
    }
  } catch (error) {
    if (signal.aborted || error instanceof CallError) throw error;
    if (isDone) return;
    const isJson = error instanceof SyntaxError;
    throw new CallError(isJson ? "The server sent what is no event." : "The connection was lost.");
  }
  if (!isDone) throw new CallError("The connection ended in the middle of the answer.");
}

/** The data of each server-sent event of a body; comments are left out. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const pieces = (rest + value).split(/\r?\n\r?\n/);
      rest = pieces.pop();
      for (const piece of pieces) {
        const lines = piece.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function call(path, key, options) {
  if (key && !PRINTABLE.test(key)) {
    throw new CallError("API key: expected printable ASCII without spaces.", { status: 401 });
  }
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new CallError("The server cannot be reached.");
  }
  if (response.ok) return response;
  throw await refusal(response);
}

async function refusal(response) {
  const status = response.status;
  const body = await response.json().catch(() => ({}));
  const said = body.error ? told(body) : response.statusText || "no reason was given";
  const wait = response.headers.get("Retry-After");
  const later = wait ? ` Try again in ${wait} s.` : "";
  const kinds = { 401: "This server wants an API key", 503: "The server takes nothing now" };
  const head = kinds[status] ?? "The server refused";
  return new CallError(`${head} (${status}): ${said}.${later}`, {
    status,
    code: body.error?.code ?? null,
  });
}

function told(body) {
  return String(body.error.message ?? "no reason was given").replace(/\.$/, "");
}
