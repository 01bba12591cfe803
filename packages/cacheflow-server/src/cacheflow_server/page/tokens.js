// Tokens of a text, and what is known of each: shown in a tip under the pointer, and by the arrow keys.

const tip = document.getElementById("tip");
const UNSURE = 0.5;
const UNLIKELY = 0.1;

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 99.95 ? "100 %" : share >= 10 ? `${share.toFixed(0)} %` : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};
const visible = (text) => JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "␣") || "∅";
const spoken = (text) => (text.trim() === "" ? "white space" : text.trim());

/**
 * Cuts a text into pieces, each with the tokens that it is made of: mostly one, and several where a character is. A token
 * that is not in the text (the end of text, or what a stop string cut off) is in no piece.
 */
export function align(text, tokens) {
  const pieces = [];
  let position = 0;
  let pending = [];
  for (const token of tokens) {
    const isWhole = token.token !== "" && !token.token.includes("\ufffd");
    const at = isWhole ? text.indexOf(token.token, position) : -1;
    if (at < 0 || (at > position && pending.length === 0) || at - position > 4 * pending.length) {
      pending.push(token);
      continue;
    }
    if (at > position) pieces.push({ text: text.slice(position, at), tokens: pending });
    pieces.push({ text: token.token, tokens: [token] });
    pending = [];
    position = at + token.token.length;
  }
  if (position < text.length) pieces.push({ text: text.slice(position), tokens: pending });
  return pieces;
}

const alternatives = (token) => Object.entries(token.top).sort((a, b) => b[1] - a[1]);

function describe(piece) {
  const token = piece.tokens[0];
  const others = alternatives(token).filter(([text]) => text !== token.token);
  const rest = others.map(([text, logprob]) => `${spoken(text)} ${percent(logprob)}`).join(", ");
  return `${spoken(piece.text)}, ${percent(token.logprob)}${rest ? `; instead: ${rest}` : ""}`;
}

function showTip(span) {
  const piece = span.piece;
  tip.replaceChildren();
  for (const token of piece.tokens) {
    for (const [text, logprob] of alternatives(token)) {
      const row = document.createElement("div");
      row.className = text === token.token ? "row is-chosen" : "row";
      const name = document.createElement("span");
      name.className = "mono";
      name.textContent = visible(text);
      const bar = document.createElement("span");
      bar.className = "bar";
      bar.append(document.createElement("i"));
      bar.firstChild.style.width = `${100 * Math.exp(logprob)}%`;
      const share = document.createElement("b");
      share.textContent = percent(logprob);
      row.append(name, bar, share);
      tip.append(row);
    }
  }
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
  const fits = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${fits ? box.bottom + 8 : box.top - 8 - tip.offsetHeight}px`;
}

const hideTip = () => {
  tip.hidden = true;
};

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});

/** An element whose tokens can be pointed at, and walked through with the arrow keys. `label` names it. */
export class TokenText {
  constructor(label) {
    this.element = document.createElement("span");
    this.element.className = "tokens";
    this.label = label;
    for (const name of ["pointerover", "focusin"]) {
      this.element.addEventListener(name, (event) => {
        const span = event.target.closest(".token");
        if (span) showTip(span);
        else hideTip();
      });
    }
    this.element.addEventListener("pointerleave", hideTip);
    this.element.addEventListener("focusout", hideTip);
    this.element.addEventListener("keydown", (event) => this.walk(event));
  }

  /** Shows a text, which has mostly grown; what is shown already is left as it is. */
  show(text, tokens) {
    const pieces = tokens ? align(text, tokens) : [{ text, tokens: [] }];
    const spans = this.element.children;
    let same = 0;
    while (
      same < spans.length && same < pieces.length && spans[same].piece.text === pieces[same].text &&
      spans[same].piece.tokens.length === pieces[same].tokens.length
    ) same++;
    while (spans.length > same) spans[spans.length - 1].remove();
    for (const piece of pieces.slice(spans.length)) this.element.append(this.span(piece));
    if (tokens && spans.length) {
      this.element.setAttribute("role", "listbox");
      this.element.setAttribute("aria-orientation", "horizontal");
      this.element.setAttribute("aria-label", this.label);
      if (!this.element.querySelector('[tabindex="0"]')) spans[0].tabIndex = 0;
    }
  }

  span(piece) {
    const span = document.createElement("span");
    span.piece = piece;
    // White space before a word is not underlined with it.
    const word = document.createElement("span");
    word.className = "word";
    word.textContent = piece.text.trimStart();
    span.append(piece.text.slice(0, piece.text.length - word.textContent.length), word);
    if (piece.tokens.length) {
      const chance = Math.exp(piece.tokens[0].logprob);
      span.className = chance < UNLIKELY ? "token unlikely" : chance < UNSURE ? "token unsure" : "token";
      span.tabIndex = -1;
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      span.setAttribute("aria-label", describe(piece));
    }
    return span;
  }

  walk(event) {
    const spans = [...this.element.querySelectorAll(".token")];
    const at = spans.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const next = spans[Math.max(0, Math.min(to, spans.length - 1))];
    for (const span of [spans[at], next]) {
      span.tabIndex = span === next ? 0 : -1;
      span.setAttribute("aria-selected", String(span === next));
    }
    next.focus();
  }
}
