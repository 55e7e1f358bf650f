// The conversation: sends it, shows the answer as it comes, and stops it.
// What a model writes reaches the page through `textContent` alone, never as HTML.

import { answer } from "./api.js";
import { read } from "./settings.js";
import { explain } from "./tip.js";

// Natural logarithms of 50 %, 10 % and 1 %.
const CLASSES = [[-0.69, "likely"], [-2.3, "fair"], [-4.6, "unlikely"]];

export class Chat {
  #turns = [];
  #running = null;

  constructor({ log, compose, controls, modelName }) {
    this.log = log;
    this.compose = compose;
    this.controls = controls;
    this.modelName = modelName;
    this.message = compose.querySelector("#message");
    this.sendButton = compose.querySelector("#send");
    this.stopButton = compose.querySelector("#stop");
    compose.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    compose.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing
          && event.target === this.message) {
        event.preventDefault();
        compose.requestSubmit();
      }
    });
    this.stopButton.addEventListener("click", () => this.stop());
    compose.querySelector("#clear").addEventListener("click", () => this.clear());
    log.addEventListener("keydown", (event) => this.#walk(event));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
  }

  /** Left and right move the focus from token to token; one tab stop for all. */
  #walk(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const tokens = [...this.log.querySelectorAll(".token")];
    if (!step || !tokens.length) return;
    const at = tokens.indexOf(document.activeElement);
    const next = at < 0 ? (step > 0 ? 0 : tokens.length - 1) : at + step;
    tokens[Math.max(0, Math.min(tokens.length - 1, next))].focus();
    event.preventDefault();
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    this.#turns = [];
    this.log.querySelectorAll(".turn").forEach((turn) => turn.remove());
    this.log.querySelector("#empty").hidden = false;
    this.message.focus();
  }

  async send() {
    const settings = read(this.controls);
    const text = this.message.value;
    if (!settings || this.#running || text.trim() === "") return;
    this.message.value = "";
    this.log.querySelector("#empty").hidden = true;
    this.#show("user", settings.mode === "chat" ? "you" : "prompt")
      .text.textContent = text;
    this.#turns.push({ role: "user", content: text });
    const view = this.#show("assistant", this.modelName() ?? "model");
    await this.#stream({ ...settings, ...this.#promptOf(settings, text) }, view);
  }

  #promptOf(settings, text) {
    const system = settings.system ? [{ role: "system", content: settings.system }] : [];
    return {
      model: this.modelName(),
      messages: [...system, ...this.#turns],
      prompt: text,
    };
  }

  async #stream(request, view) {
    this.#running = new AbortController();
    this.#setRunning(view, true);
    let content = "";
    let ending = "";
    try {
      for await (const piece of answer(request, this.#running.signal)) {
        if (piece.usage) {
          ending += ` · ${piece.usage.completion_tokens} tokens`;
          continue;
        }
        content += piece.text;
        this.#append(view, piece);
        if (piece.finishReason) ending = piece.finishReason;
      }
    } catch (error) {
      const stopped = error.name === "AbortError";
      ending = stopped ? "stopped" : error.message;
      view.note.classList.toggle("warn", !stopped);
    }
    view.note.textContent = ending;
    this.#turns.push({ role: "assistant", content });
    this.#running = null;
    this.#setRunning(view, false);
  }

  #append(view, piece) {
    const follow = isAtEnd(this.log);
    if (piece.reasoning) {
      view.reasoning.hidden = false;
      view.reasoning.append(piece.reasoning);
    }
    view.text.append(...pieceElements(piece));
    for (const call of piece.calls) this.#appendCall(view, call);
    if (follow) this.log.scrollTop = this.log.scrollHeight;
  }

  #appendCall(view, call) {
    const index = String(call.index);
    let box = view.turn.querySelector(`.call[data-index="${CSS.escape(index)}"]`);
    if (!box) {
      box = element("pre", "call");
      box.dataset.index = index;
      view.note.before(box);
    }
    box.append(call.function?.name ? `${call.function.name} ` : "",
      call.function?.arguments ?? "");
  }

  #show(role, name) {
    const turn = element("article", `turn ${role}`);
    const who = element("div", "who");
    who.textContent = name;
    const reasoning = element("div", "reasoning");
    reasoning.hidden = true;
    const text = element("div", "text");
    const note = element("p", "note");
    turn.append(who, reasoning, text, note);
    this.log.append(turn);
    this.log.scrollTop = this.log.scrollHeight;
    return { turn, reasoning, text, note };
  }

  #setRunning(view, running) {
    view.turn.classList.toggle("running", running);
    this.sendButton.disabled = running;
    this.stopButton.disabled = !running;
  }
}

function element(kind, classes) {
  const result = document.createElement(kind);
  result.className = classes;
  return result;
}

/** The text of a piece token by token, or as it is where the tokens do not make it up.
 *
 * They do not where a character is shared by tokens, or where a stop token was cut off.
 */
function pieceElements(piece) {
  let made = "";
  const shown = piece.tokens.filter((token) => {
    const fits = token.text !== "" && piece.text.startsWith(made + token.text);
    if (fits) made += token.text;
    return fits;
  });
  return made === piece.text ? shown.map(tokenElement) : [piece.text];
}

function tokenElement(token) {
  const result = element("span", `token ${classOf(token.logprob)}`);
  result.textContent = token.text;
  result.tabIndex = -1;
  explain(result, token);
  return result;
}

function classOf(logprob) {
  return CLASSES.find(([bound]) => logprob >= bound)?.[1] ?? "rare";
}

function isAtEnd(log) {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 40;
}
