// The form: from its fields to the body of a request, and from an error back to its field.

const NUMBERS = [
  "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed", "best_of", "presence_penalty", "frequency_penalty",
  "repetition_penalty", "length_penalty", "min_tokens",
];
const DEFAULTS = { n: 1, temperature: 1, top_p: 1 };
const NUM_ALTERNATIVES = 5;

const PRESETS = {
  complete: { mode: "sample", prompt: "San Francisco is a", max_tokens: 96, n: 1, temperature: 0.8, top_p: 0.95 },
  samples: { mode: "sample", prompt: "Once upon a time, a lighthouse keeper", max_tokens: 128, n: 4, temperature: 0.7, top_p: 0.95 },
  beams: { mode: "beam", prompt: "The capital of France is", max_tokens: 32, n: 4 },
};

const form = document.getElementById("form");
const element = (id) => document.getElementById(id);
const mode = () => form.elements.mode.value;
const isOn = (field) => (field.dataset.modes ?? mode()).split(" ").includes(mode());

/** The number as it is written where a number of JavaScript would round it, as a seed of 63 bits. */
function exact(text) {
  const number = Number(text);
  if (Number.isNaN(number)) return text;
  return /^\d+$/.test(text) && !Number.isSafeInteger(number) && JSON.rawJSON ? JSON.rawJSON(text) : number;
}

/** The body of the request that the form describes; what is left at its default is left out. */
export function requestBody() {
  const body = { prompt: element("prompt").value };
  if (mode() !== "sample") body.temperature = 0;
  if (mode() === "beam") body.use_beam_search = true;
  for (const name of NUMBERS) {
    const text = element(name).value.trim();
    if (text === "" || !isOn(element(name).closest(".field"))) continue;
    const value = exact(text);
    if (DEFAULTS[name] !== value) body[name] = value;
  }
  const stop = element("stop").value.split("\n").filter((line) => line !== "");
  if (stop.length) body.stop = stop.map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  if (element("ignore_eos").checked) body.ignore_eos = true;
  if (element("logprobs").checked) body.logprobs = NUM_ALTERNATIVES;
  return JSON.stringify(body);
}

/** Marks the field that an error names and moves the focus there. */
export function markField(name, message) {
  const field = form.querySelector(`[data-field="${CSS.escape(name)}"]`);
  if (!field) return;
  field.closest("details")?.setAttribute("open", "");
  const input = field.querySelector("input, textarea");
  field.classList.add("is-wrong");
  field.title = message;
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-errormessage", "error");
  input.focus();
}

export function clearMarks() {
  for (const field of form.querySelectorAll(".is-wrong")) {
    field.classList.remove("is-wrong");
    field.removeAttribute("title");
    const input = field.querySelector("input, textarea");
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-errormessage");
  }
}

function showMode() {
  for (const field of form.querySelectorAll("[data-modes]")) {
    field.classList.toggle("is-off", !isOn(field));
    field.querySelector("input").disabled = !isOn(field);
  }
}

/** Starts the form; `changed` is called whenever the request that it describes may be another. */
export function startForm(changed) {
  const update = () => {
    showMode();
    changed();
  };
  form.addEventListener("input", update);
  for (const button of document.querySelectorAll("[data-preset]")) {
    button.addEventListener("click", () => {
      form.reset();
      for (const [name, value] of Object.entries(PRESETS[button.dataset.preset])) form.elements[name].value = value;
      clearMarks();
      update();
    });
  }
  update();
}
