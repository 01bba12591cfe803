// Starts the two halves of the page, and asks for the key that they may need.

import { useKey } from "./api.js";
import { startLive } from "./live.js";
import { startPlayground } from "./playground.js";

const form = document.getElementById("key-form");
const input = document.getElementById("key");

addEventListener("keyneeded", () => {
  if (!form.hidden) return;
  form.hidden = false;
  input.value = "";
  input.focus();
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(input.value);
  form.hidden = true;
  dispatchEvent(new Event("keychosen"));
});

startPlayground();
startLive();
