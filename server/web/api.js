// The calls that the page makes; all of them to the server that sent it.

import { events } from "./sse.js";

const TOP_LOGPROBS = 5;

/** A piece of an answer: text, reasoning, tokens with their scores, tool calls. */
function pieceOfChat(choice) {
  const delta = choice.delta ?? {};
  return {
    text: delta.content ?? "",
    reasoning: delta.reasoning ?? "",
    calls: delta.tool_calls ?? [],
    tokens: (choice.logprobs?.content ?? []).map((entry) => ({
      text: entry.token,
      logprob: entry.logprob,
      top: entry.top_logprobs.map((other) => [other.token, other.logprob]),
    })),
    finishReason: choice.finish_reason,
  };
}

function pieceOfCompletion(choice) {
  const scores = choice.logprobs;
  return {
    text: choice.text ?? "",
    reasoning: "",
    calls: [],
    tokens: (scores?.tokens ?? []).map((text, index) => ({
      text,
      logprob: scores.token_logprobs[index],
      top: Object.entries(scores.top_logprobs?.[index] ?? {}),
    })),
    finishReason: choice.finish_reason,
  };
}

function headers(key) {
  const result = { "Content-Type": "application/json" };
  if (key) result.Authorization = `Bearer ${key}`;
  return result;
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // A proxy's page, say: the status is all there is to tell.
  }
  throw new Error(message);
}

/** The name of the served model. */
export async function servedModel(key) {
  const response = await checked(await fetch("v1/models", { headers: headers(key) }));
  return (await response.json()).data[0].id;
}

/** What the engine is doing now. */
export async function engineState(key) {
  const response = await fetch("engine/state", { headers: headers(key) });
  return (await checked(response)).json();
}

/** Sum and count of a histogram of the server's metrics since it started. */
export async function histograms(key, names) {
  const response = await checked(await fetch("metrics", { headers: headers(key) }));
  const text = await response.text();
  const value = (name) => {
    const found = text.match(new RegExp(`^jllm:${name}(?:\\{[^}]*\\})? (\\S+)$`, "m"));
    return found ? Number(found[1]) : 0;
  };
  return names.map((name) => ({ sum: value(`${name}_sum`), count: value(`${name}_count`) }));
}

/** Streams an answer; yields pieces, and last `{usage}`. */
export async function* answer(request, signal) {
  const isChat = request.mode === "chat";
  const body = {
    model: request.model,
    stream: true,
    stream_options: { include_usage: true },
    ...request.sampling,
  };
  if (isChat) {
    body.messages = request.messages;
    if (request.logprobs) Object.assign(body, { logprobs: true, top_logprobs: TOP_LOGPROBS });
  } else {
    body.prompt = request.prompt;
    if (request.logprobs) body.logprobs = TOP_LOGPROBS;
  }
  const path = isChat ? "v1/chat/completions" : "v1/completions";
  const response = await checked(
    await fetch(path, {
      method: "POST",
      headers: headers(request.key),
      body: JSON.stringify(body),
      signal,
    }),
  );
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    if (choice) yield isChat ? pieceOfChat(choice) : pieceOfCompletion(choice);
    if (event.usage) yield { usage: event.usage };
  }
}
