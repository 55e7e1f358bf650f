// One tooltip for all tokens: the chosen one and its best rivals.

const tip = document.querySelector("#tip");

/** Shows a token's probabilities while the pointer or the focus is on it. */
export function explain(target, token) {
  const show = () => {
    tip.replaceChildren(table(token));
    tip.hidden = false;
    place(target.getBoundingClientRect());
  };
  const hide = () => { tip.hidden = true; };
  target.addEventListener("pointerenter", show);
  target.addEventListener("focus", show);
  target.addEventListener("pointerleave", hide);
  target.addEventListener("blur", hide);
}

function table(token) {
  const result = document.createElement("table");
  const isListed = token.top.some(([text]) => text === token.text);
  const entries = isListed ? token.top : [[token.text, token.logprob], ...token.top];
  for (const [text, logprob] of entries) {
    const row = result.insertRow();
    row.className = text === token.text ? "chosen" : "";
    row.insertCell().textContent = JSON.stringify(text).slice(1, -1);
    row.insertCell().textContent = logprob.toFixed(2);
    row.insertCell().textContent = `${(100 * Math.exp(logprob)).toFixed(1)} %`;
  }
  return result;
}

function place(box) {
  const { width, height } = tip.getBoundingClientRect();
  const below = box.bottom + 6 + height < innerHeight;
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - width - 4))}px`;
  tip.style.top = `${below ? box.bottom + 6 : box.top - height - 6}px`;
}
