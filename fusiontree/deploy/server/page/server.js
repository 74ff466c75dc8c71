// The server's routes. What goes wrong is an ApiError with the server's own words.
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function failed(response) {
  const body = await response.json().catch(() => null);
  return new ApiError(body?.error?.message ?? response.statusText, response.status);
}

export async function get(path) {
  const response = await fetch(path);
  if (!response.ok) throw await failed(response);
  return response.json();
}

// The chunks of a streamed answer; `signal` ends it, which frees the server's slot too.
export async function* stream(path, body, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true }, gates: true };
  const headers = { "Content-Type": "application/json" };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(request), signal });
  if (!response.ok) throw await failed(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError("the stream broke off", 0);
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new ApiError(chunk.error.message, 0);
      yield chunk;
    }
  }
}
