// Puts the parts of the page together.

import { servedModel } from "./api.js";
import { Chat } from "./chat.js";
import { EngineView } from "./engine.js";
import { keyOf, setUp } from "./settings.js";

const controls = document.querySelector("#controls");
const label = document.querySelector("#model");
let model = null;

setUp(controls);
const chat = new Chat({
  log: document.querySelector("#log"),
  compose: document.querySelector("#compose"),
  controls,
  modelName: () => model,
});
new EngineView({
  root: document.querySelector("#engine"),
  key: () => keyOf(controls),
}).watch();

async function connect() {
  try {
    model = await servedModel(keyOf(controls));
    label.textContent = model;
    label.classList.remove("warn");
  } catch (error) {
    label.textContent = error.message;
    label.classList.add("warn");
  }
}

function showMode() {
  const isChat = controls.elements.mode.value === "chat";
  document.querySelector("#system-field").hidden = !isChat;
  chat.message.placeholder = isChat ? "Message" : "Text to go on from";
}

/** Small screens show one view at a time. */
function showView(name) {
  for (const section of document.querySelectorAll("main > section")) {
    section.classList.toggle("shown", section.id === name);
  }
  for (const button of document.querySelectorAll("nav button")) {
    button.setAttribute("aria-pressed", String(button.dataset.view === name));
  }
}

document.querySelector("nav").addEventListener("click", (event) => {
  if (event.target.dataset.view) showView(event.target.dataset.view);
});
controls.addEventListener("change", () => {
  showMode();
  if (model === null) connect();
});
controls.elements.key.addEventListener("change", connect);
controls.addEventListener("reset", () => setTimeout(showMode));
showView("chat");
showMode();
connect();
