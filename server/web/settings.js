// The form of settings: how it is built, read and remembered.

// name, label, lowest, highest, step, default of the model
const NUMBERS = [
  ["temperature", "Temperature", 0, 2, 0.05, "1"],
  ["max_tokens", "Most tokens", 1, 1000000, 1, "256"],
  ["top_p", "Top-p", 0.01, 1, 0.01, "1"],
  ["top_k", "Top-k", 0, 1000000, 1, "all"],
  ["min_p", "Min-p", 0, 1, 0.01, "0"],
  ["seed", "Seed", 0, 2 ** 53 - 1, 1, "random"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "0"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "0"],
  ["repetition_penalty", "Repetition penalty", 0.05, 10, 0.05, "1"],
];
const DEFAULT_MAX_TOKENS = 256;
const STORE = "jllm-settings";

/** Builds the number fields and fills the form with what was set last. */
export function setUp(form) {
  const grid = form.querySelector("#numbers");
  for (const [name, label, min, max, step, standard] of NUMBERS) {
    const field = document.createElement("label");
    field.textContent = label;
    const input = document.createElement("input");
    Object.assign(input, { type: "number", name, min, max, step, placeholder: standard });
    // Any finite number between the bounds; the arrows move by `step`.
    input.step = Number.isInteger(step) ? step : "any";
    field.append(input);
    grid.append(field);
  }
  restore(form);
  form.addEventListener("input", () => remember(form));
  form.addEventListener("reset", () => setTimeout(() => remember(form)));
  form.addEventListener("submit", (event) => event.preventDefault());
}

/** The settings as they stand; null and a mark on the field where one is invalid. */
export function read(form) {
  if (!form.reportValidity()) return null;
  const data = new FormData(form);
  const sampling = { max_tokens: DEFAULT_MAX_TOKENS };
  for (const [name] of NUMBERS) {
    const value = data.get(name);
    if (value !== "") sampling[name] = Number(value);
  }
  const stop = data.get("stop").split("\n").filter((line) => line !== "");
  if (stop.length) sampling.stop = stop;
  return {
    mode: data.get("mode"),
    system: data.get("system").trim(),
    logprobs: data.has("logprobs"),
    key: keyOf(form),
    sampling,
  };
}

/** The API key in the form, "" when there is none. */
export function keyOf(form) {
  return form.elements.key.value.trim();
}

// The key is kept for this tab only, the rest for the next visit.
function remember(form) {
  const data = Object.fromEntries(new FormData(form));
  sessionStorage.setItem(`${STORE}-key`, data.key);
  delete data.key;
  localStorage.setItem(STORE, JSON.stringify({ ...data, logprobs: "logprobs" in data }));
}

function restore(form) {
  form.elements.key.value = sessionStorage.getItem(`${STORE}-key`) ?? "";
  const saved = JSON.parse(localStorage.getItem(STORE) ?? "{}");
  for (const [name, value] of Object.entries(saved)) {
    if (name === "logprobs") form.elements.logprobs.checked = value;
    else if (form.elements[name]) form.elements[name].value = value;
  }
}
