// One request at a time: sends the form, shows the texts as they grow, and what went wrong.

import { generate, newRequestId } from "./api.js";
import { curlFor } from "./curl.js";
import { clearMarks, markField, requestBody, startForm } from "./parameters.js";
import { TokenText } from "./tokens.js";

const element = (id) => document.getElementById(id);
const outputs = element("outputs");
const status = element("run");
const REASONS = { stop: "ended", length: "at max tokens", abort: "stopped", error: "failed" };
const SHOWN_OF_PROMPT = 240;

let running = null;
let countdown = null;

/** A text in a box of its own; boxes have a fixed height, so that nothing moves while texts grow. */
class Choice {
  constructor(index, prompt) {
    this.element = document.createElement("article");
    this.element.className = "choice is-running";
    const title = document.createElement("h3");
    title.textContent = `Choice ${index + 1}`;
    title.id = `choice-${index + 1}`;
    this.element.setAttribute("aria-labelledby", title.id);
    this.note = document.createElement("span");
    this.note.className = "hint";
    title.append(this.note);
    this.scroller = document.createElement("div");
    this.scroller.className = "text";
    this.scroller.tabIndex = 0;
    this.scroller.setAttribute("role", "region");
    this.scroller.setAttribute("aria-label", `Text of choice ${index + 1}`);
    const start = document.createElement("span");
    start.className = "prompt";
    start.textContent = prompt.length > SHOWN_OF_PROMPT ? `…${prompt.slice(-SHOWN_OF_PROMPT)}` : prompt;
    this.tokens = new TokenText(`Tokens of choice ${index + 1}`);
    const end = document.createElement("span");
    end.className = "token-end";
    this.scroller.append(start, this.tokens.element, end);
    this.element.append(title, this.scroller);
  }

  show(text, tokens, reason) {
    const isAtEnd = this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight < 40;
    this.tokens.show(text, tokens);
    if (isAtEnd) this.scroller.scrollTop = this.scroller.scrollHeight;
    const count = tokens ? `${tokens.length} tokens` : "";
    this.end(reason, count);
  }

  end(reason, count = this.note.textContent) {
    this.note.textContent = [count, REASONS[reason] ?? reason].filter(Boolean).join(" · ");
    this.element.classList.toggle("is-running", !reason);
  }
}

function showChoices(choices, answer, prompt) {
  answer.text.forEach((text, index) => {
    if (!choices[index]) {
      choices[index] = new Choice(index, prompt);
      outputs.append(choices[index].element);
    }
    choices[index].show(text.slice(prompt.length), answer.logprobs?.[index], answer.finish_reasons[index]);
  });
}

/** What is shown until the first texts come; with beams that is at the end. */
function prepare(body, prompt) {
  const choices = Array.from({ length: Math.min(Number(body.n ?? 1) || 1, 128) }, (_, index) => new Choice(index, prompt));
  outputs.replaceChildren(...choices.map((choice) => choice.element));
  return choices;
}

const milliseconds = (value) => (value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`);

function timing(start, first, last, numEvents) {
  const parts = [`first token ${milliseconds(first - start)}`];
  if (numEvents > 1) parts.push(`then every ${milliseconds((last - first) / (numEvents - 1))}`);
  return [...parts, `${((last - start) / 1000).toFixed(1)} s`].join(" · ");
}

async function run() {
  if (running) return;
  clearError();
  running = new AbortController();
  element("generate").disabled = true;
  element("stop-button").disabled = false;
  const body = requestBody();
  const asked = JSON.parse(body);
  const id = newRequestId();
  dispatchEvent(new CustomEvent("requeststarted", { detail: id }));
  const choices = prepare(asked, asked.prompt);
  status.textContent = asked.use_beam_search ? "Searching; beams come together, at the end." : "Waiting for the first token.";
  const start = performance.now();
  let first = null, last = null, numEvents = 0, latest = null, frame = 0;
  const draw = () => {
    frame = 0;
    showChoices(choices, latest, asked.prompt);
  };
  try {
    for await (const answer of generate(body, id, running.signal)) {
      last = performance.now();
      first ??= last;
      numEvents++;
      latest = answer;
      if (numEvents === 1) status.textContent = "Generating.";
      frame ||= requestAnimationFrame(draw);
    }
    status.textContent = first === null ? "Nothing was generated." : `Done: ${timing(start, first, last, numEvents)}`;
  } catch (error) {
    const isStopped = error.name === "AbortError";
    if (first === null) outputs.replaceChildren();
    status.textContent = isStopped ? "Stopped." : "";
    if (!isStopped) showError(error);
  } finally {
    cancelAnimationFrame(frame);
    if (latest) draw();
    const reason = running.signal.aborted ? "abort" : "error";
    for (const choice of choices) if (choice.element.classList.contains("is-running")) choice.end(reason);
    running = null;
    element("generate").disabled = false;
    element("stop-button").disabled = true;
  }
}

function clearError() {
  clearInterval(countdown);
  element("error").hidden = true;
  clearMarks();
}

function showError(error) {
  const box = element("error");
  const name = document.createElement("b");
  name.textContent = error.status ? `${error.status}${error.field ? ` · ${error.field}` : ""}` : "No answer";
  const message = document.createElement("span");
  message.textContent = error.message;
  box.replaceChildren(name, message);
  if (!error.status || error.status >= 500) box.append(retryButton(error.retryAfter));
  box.hidden = false;
  if (error.field) markField(error.field, error.message);
  if (error.status === 401) dispatchEvent(new Event("keyneeded"));
}

function retryButton(seconds) {
  const button = document.createElement("button");
  button.type = "button";
  button.addEventListener("click", run);
  let left = seconds ?? 0;
  const label = () => {
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    button.disabled = left > 0;
  };
  label();
  countdown = setInterval(() => {
    if (left-- <= 0) clearInterval(countdown);
    else label();
  }, 1000);
  return button;
}

async function copy() {
  const button = element("copy");
  try {
    await navigator.clipboard.writeText(element("curl").textContent);
    button.textContent = "Copied";
  } catch {
    // Only pages of https and of this machine may write to the clipboard; the command is selected instead.
    getSelection().selectAllChildren(element("curl"));
    button.textContent = "Selected: press Ctrl + C";
  }
  setTimeout(() => {
    button.textContent = "Copy";
  }, 2000);
}

export function startPlayground() {
  const showCurl = () => {
    element("curl").textContent = curlFor(requestBody());
  };
  startForm(showCurl);
  addEventListener("keychosen", showCurl);
  element("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  element("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  });
  element("stop-button").addEventListener("click", () => running?.abort());
  element("copy").addEventListener("click", copy);
}
