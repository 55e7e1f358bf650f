// The live view of the engine: figures, tokens per second, the map of KV blocks.

import { engineState, histograms } from "./api.js";

const INTERVAL_MS = 1000;
const HISTORY = 180;
const KINDS = { f: "free", c: "cached", u: "used", s: "shared" };
const LATENCIES = ["time_to_first_token_seconds", "inter_token_latency_seconds"];
const FIGURES = [
  ["running", "Running", (state) => state.running],
  ["waiting", "Waiting", (state) => state.waiting],
  ["rate", "Tokens/s", (state) => state.tokens_per_second.toFixed(1)],
  ["usage", "KV in use", (state) => shareInUse(state.blocks)],
  ["ttft", "TTFT, mean", (state) => milliseconds(state.latencies[0])],
  ["itl", "ITL, mean", (state) => milliseconds(state.latencies[1])],
];

export class EngineView {
  #rates = [];
  #totals = [];
  #cells = {};

  constructor({ root, key }) {
    this.key = key;
    this.status = root.querySelector("#engine-status");
    this.rate = root.querySelector("#rate");
    this.blocks = root.querySelector("#blocks");
    this.legend = root.querySelector("#legend");
    const list = root.querySelector("#figures");
    for (const [name, label] of FIGURES) {
      const term = document.createElement("dt");
      term.textContent = label;
      const value = document.createElement("dd");
      value.id = `figure-${name}`;
      value.textContent = "–";
      const pair = document.createElement("div");
      pair.append(term, value);
      list.append(pair);
      this.#cells[name] = value;
    }
  }

  /** Reads the engine once a second while the page is visible. */
  async watch() {
    for (;;) {
      if (!document.hidden) await this.#read();
      await new Promise((resolve) => setTimeout(resolve, INTERVAL_MS));
    }
  }

  async #read() {
    try {
      const [state, totals] = await Promise.all([
        engineState(this.key()),
        histograms(this.key(), LATENCIES),
      ]);
      this.#draw({ ...state, latencies: this.#means(totals) });
      this.status.classList.remove("warn");
      this.status.textContent = state.status;
    } catch (error) {
      this.status.classList.add("warn");
      this.status.textContent = error.message;
    }
  }

  /** Means over the readings that are remembered; null where nothing came. */
  #means(totals) {
    this.#totals.push(totals);
    if (this.#totals.length > HISTORY) this.#totals.shift();
    return totals.map((last, index) => {
      const first = this.#totals[0][index];
      const count = last.count - first.count;
      return count > 0 ? (last.sum - first.sum) / count : null;
    });
  }

  #draw(state) {
    for (const [name, , value] of FIGURES) this.#cells[name].textContent = value(state);
    this.#rates.push(state.tokens_per_second);
    if (this.#rates.length > HISTORY) this.#rates.shift();
    drawRates(this.rate, this.#rates);
    drawBlocks(this.blocks, state.block_map);
    this.#drawLegend(state.blocks);
  }

  #drawLegend(blocks) {
    const items = Object.values(KINDS).map((kind) => {
      const item = document.createElement("li");
      const swatch = document.createElement("i");
      swatch.className = kind;
      item.append(swatch, `${kind} ${blocks[kind].toLocaleString()}`);
      return item;
    });
    this.legend.replaceChildren(...items);
    this.blocks.setAttribute("aria-label",
      `KV blocks: ${items.map((item) => item.textContent).join(", ")}`);
  }
}

function shareInUse(blocks) {
  const used = blocks.used + blocks.shared;
  const total = used + blocks.free + blocks.cached;
  return total ? `${((100 * used) / total).toFixed(1)} %` : "–";
}

function milliseconds(seconds) {
  return seconds === null ? "–" : `${(1000 * seconds).toFixed(1)} ms`;
}

/** The canvas' context at the screen's resolution, cleared. */
function cleared(canvas, height) {
  const width = canvas.clientWidth;
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  return { context, width };
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
}

function drawRates(canvas, rates) {
  const height = 64;
  const { context, width } = cleared(canvas, height);
  const top = Math.max(1, ...rates);
  const x = (index) => (index * width) / (HISTORY - 1);
  const y = (rate) => height - 2 - (rate / top) * (height - 16);
  context.strokeStyle = colour("accent");
  context.lineWidth = 1.5;
  context.beginPath();
  rates.forEach((rate, index) => context.lineTo(x(index), y(rate)));
  context.stroke();
  context.fillStyle = colour("quiet");
  context.font = "11px system-ui, sans-serif";
  context.fillText(`top ${top.toFixed(0)}`, 2, 10);
}

/** Draws one small square per cell, each a block or a run of blocks. */
function drawBlocks(canvas, map) {
  if (!map) return;
  const gap = 1;
  const available = canvas.clientWidth;
  const size = Math.max(3, Math.min(12, Math.floor(Math.sqrt((available * 160) / map.length))));
  const columns = Math.max(1, Math.floor(available / size));
  const height = Math.max(size, Math.ceil(map.length / columns) * size);
  const { context } = cleared(canvas, height);
  const colours = Object.fromEntries(
    Object.entries(KINDS).map(([letter, kind]) => [letter, colour(kind)]),
  );
  [...map].forEach((letter, index) => {
    context.fillStyle = colours[letter];
    const x = (index % columns) * size;
    const y = Math.floor(index / columns) * size;
    context.fillRect(x, y, size - gap, size - gap);
  });
}
