// Server-sent events of a fetch response, as an asynchronous sequence of objects.

const DONE = "[DONE]";

/** Yields the parsed data of each event until "[DONE]" or the end of the body. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = dataOf(part);
      if (data === DONE) return;
      if (data) yield JSON.parse(data);
    }
  }
}

function dataOf(event) {
  return event
    .split(/\r?\n/)
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart())
    .join("\n");
}
