// The engine as it runs: asks the server for its numbers twice a second while the page is looked at, and shows them.

import { read } from "./api.js";
import { BlockMap, CACHED, FIRST_OWNER, FREE, NUM_LOOKS, paintSwatch, SHARED } from "./blocks.js";
import { Chart } from "./chart.js";

const PERIOD_MS = 500;
const RETRY_MS = 2000;
/** With this many blocks a reading is a quarter of a megabyte, and one a second has to do. */
const MANY_BLOCKS = 50_000;
const ANNOUNCE_MS = 20_000;
const RATE_READINGS = 4;

const element = (id) => document.getElementById(id);
const map = new BlockMap(element("blocks"));
const charts = Object.fromEntries(["tokens", "ttft", "itl", "usage"].map((name) => [name, new Chart(element(`${name}-chart`))]));
const looks = new Map();
let marked = null;
/** The id of the playground's newest request; the engine has it with more behind it. */
let own = null;
let requests = [];
let blocks = [];
let readings = [];
let announced = { at: -Infinity, text: "" };
let isPaused = false;

const count = (value) => value.toLocaleString("en");
const set = (id, text) => {
  if (element(id).textContent !== text) element(id).textContent = text;
};

function setWithUnit(id, text, unit) {
  if (element(id).textContent === `${text}${unit}`) return;
  const small = document.createElement("small");
  small.textContent = unit;
  element(id).replaceChildren(text, small);
}

const duration = (seconds) => (seconds >= 1 ? [seconds.toFixed(2), "s"] : [(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0), "ms"]);
const age = (seconds) => (seconds < 60 ? `${Math.max(0, Math.floor(seconds))} s` : `${Math.floor(seconds / 60)} min`);

/** A look for each request, the same as long as it is there; the lowest that is free when it comes. */
function giveLooks() {
  const keys = new Set(requests.map(keyOf));
  for (const key of looks.keys()) if (!keys.has(key)) looks.delete(key);
  const used = new Set(looks.values());
  for (const key of keys) {
    if (looks.has(key)) continue;
    let number = 0;
    while (used.has(number)) number++;
    used.add(number);
    looks.set(key, number);
  }
}

const keyOf = (request) => `${request.client_id}/${request.request_id}`;

function showRates(stats, latency) {
  readings.push({ at: performance.now(), tokens: stats.num_generated_tokens });
  // An engine that was started again counts from zero.
  if (readings.length > 1 && readings.at(-1).tokens < readings.at(-2).tokens) readings = readings.slice(-1);
  readings = readings.slice(-RATE_READINGS);
  const [oldest, newest] = [readings[0], readings.at(-1)];
  const rate = newest.at > oldest.at ? (1000 * (newest.tokens - oldest.tokens)) / (newest.at - oldest.at) : null;
  charts.tokens.add(rate, 1);
  set("tokens-per-s", rate === null ? "–" : rate >= 100 || rate === 0 ? rate.toFixed(0) : rate.toFixed(1));
  set("tokens-hint", `${count(stats.num_generated_tokens)} in all`);
  for (const [name, shown] of [["ttft", latency.ttft_s], ["itl", latency.itl_s]]) {
    charts[name].add(shown ? shown.p50 : null);
    if (shown) setWithUnit(name, ...duration(shown.p50));
    else set(name, "–");
    set(`${name}-hint`, shown ? `p90 ${duration(shown.p90).join(" ")}` : "none in the last minute");
  }
}

function showCounts(stats, numbers) {
  const held = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks;
  const share = stats.num_blocks ? (100 * held) / stats.num_blocks : 0;
  charts.usage.add(share, 10);
  setWithUnit("usage", share >= 10 || share === 0 ? share.toFixed(0) : share.toFixed(1), "%");
  set("usage-hint", `${count(held)} of ${count(stats.num_blocks)}`);
  set("running", count(stats.num_running));
  set("waiting", count(stats.num_waiting));
  set("preemptions", count(stats.num_preemptions));
  set("hits", stats.num_prompt_tokens ? `${((100 * stats.num_cached_tokens) / stats.num_prompt_tokens).toFixed(0)} %` : "–");
  set("blocks-hint", `${count(stats.num_blocks)} blocks`);
  set("num-free", count(numbers.free));
  set("num-cached", count(numbers.cached));
  set("num-shared", count(numbers.shared));
  set("num-held", count(numbers.held));
  set("queue-hint", `${count(stats.num_running)} running, ${count(stats.num_waiting)} waiting`);
}

function tally() {
  const numbers = { free: 0, cached: 0, shared: 0, held: 0, of: requests.map(() => 0) };
  for (const kind of blocks) {
    if (kind === FREE) numbers.free++;
    else if (kind === CACHED) numbers.cached++;
    else if (kind === SHARED) numbers.shared++;
    else {
      numbers.held++;
      numbers.of[kind - FIRST_OWNER]++;
    }
  }
  return numbers;
}

/** The row of a request, made once; only what changed in it is written again. */
function rowOf(request, known) {
  const key = keyOf(request);
  if (known.has(key)) return known.get(key);
  const row = document.createElement("tr");
  row.dataset.key = key;
  row.innerHTML =
    '<td class="who"><button type="button" aria-pressed="false"><canvas aria-hidden="true"></canvas><span></span></button></td>' +
    '<td><span class="progress"><i aria-hidden="true"><b></b></i><span></span></span></td>' +
    '<td class="number"></td><td class="number"></td><td class="number"></td><td class="number"></td>';
  row.querySelector(".who span").textContent = request.request_id.slice(0, 8);
  if (own && request.request_id.startsWith(`${own}-`)) {
    row.classList.add("is-own");
    row.querySelector("button").append("yours"); // In words, for a colour is not seen by all.
  }
  row.querySelector("button").title = `Show the blocks of ${request.request_id}`;
  row.querySelector("button").addEventListener("click", () => toggleMark(key));
  paintSwatch(row.querySelector("canvas"), looks.get(key) % NUM_LOOKS);
  return row;
}

function showRequests(numbers) {
  const body = element("requests");
  const known = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  const rows = requests.map((request, index) => {
    const row = rowOf(request, known);
    const computed = Math.min(request.num_computed_tokens, request.num_prompt_tokens);
    row.querySelector(".progress b").style.width = `${(100 * computed) / Math.max(1, request.num_prompt_tokens)}%`;
    const prompt = request.is_running && computed < request.num_prompt_tokens ? `${count(computed)}/${count(request.num_prompt_tokens)}` : count(request.num_prompt_tokens);
    const cells = row.cells;
    row.querySelector(".progress > span").textContent = prompt;
    cells[2].textContent = request.is_running ? count(request.num_output_tokens) : "waiting";
    cells[3].textContent = count(request.num_sequences);
    cells[4].textContent = count(numbers.of[index]);
    cells[5].textContent = age(Date.now() / 1000 - request.arrival_s);
    row.classList.toggle("is-waiting", !request.is_running);
    return row;
  });
  const isSame = rows.length === body.rows.length && rows.every((row, index) => row === body.rows[index]);
  if (!isSame) body.replaceChildren(...rows);
  element("idle").hidden = rows.length > 0;
}

function toggleMark(key) {
  marked = marked === key ? null : key;
  showMark();
}

function showMark() {
  const index = requests.findIndex((request) => keyOf(request) === marked);
  if (index < 0) marked = null;
  map.show(blocks, requests.map((request) => looks.get(keyOf(request)) % NUM_LOOKS), index < 0 ? null : index);
  for (const row of element("requests").rows) {
    const isMarked = row.dataset.key === marked;
    row.classList.toggle("is-marked", isMarked);
    row.querySelector("button").setAttribute("aria-pressed", String(isMarked));
  }
}

/** Names the block under the pointer; a click on it brings the blocks of its request out. */
function startMap() {
  const canvas = element("blocks");
  const ownerAt = (event) => requests[blocks[map.blockAt(event.offsetX, event.offsetY)] - FIRST_OWNER];
  canvas.addEventListener("pointermove", (event) => {
    const block = map.blockAt(event.offsetX, event.offsetY);
    const kind = ["free", "cached", "shared"][blocks[block]] ?? ownerAt(event)?.request_id;
    canvas.title = block === null ? "" : `Block ${count(block)}: ${kind}`;
  });
  canvas.addEventListener("click", (event) => {
    const owner = ownerAt(event);
    if (owner) toggleMark(keyOf(owner));
  });
}

/** A sentence for those who don't see the map: seldom, and only when there is something new to say. */
function announce(stats, numbers) {
  const text =
    `${stats.num_running} requests running, ${stats.num_waiting} waiting. ` +
    `Of ${stats.num_blocks} blocks ${numbers.held + numbers.shared} are in use and ${numbers.cached} cached.`;
  const now = performance.now();
  if (text === announced.text || now - announced.at < ANNOUNCE_MS) return;
  announced = { at: now, text };
  set("announcement", text);
}

function show(view, stats) {
  ({ requests, blocks } = view);
  giveLooks();
  const numbers = tally();
  set("model", stats.model);
  showRates(view.stats, stats.latency);
  showCounts(view.stats, numbers);
  showRequests(numbers);
  showMark();
  announce(view.stats, numbers);
}

function setHealth(state, text) {
  element("health").dataset.state = state;
  set("health", text);
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const until = (event, target) => new Promise((resolve) => target.addEventListener(event, resolve, { once: true }));

export async function startLive() {
  startMap();
  addEventListener("requeststarted", (event) => {
    own = event.detail;
  });
  element("pause").addEventListener("click", () => {
    isPaused = !isPaused;
    element("pause").setAttribute("aria-pressed", String(isPaused));
    dispatchEvent(new Event("resumed"));
  });
  for (;;) {
    if (document.hidden) await until("visibilitychange", document);
    else if (isPaused) await until("resumed", window);
    try {
      const [view, stats] = await Promise.all([read("stats/view"), read("stats")]);
      setHealth("ready", "ready");
      show(view, stats);
      await pause(view.blocks.length > MANY_BLOCKS ? 2 * PERIOD_MS : PERIOD_MS);
    } catch (error) {
      readings = [];
      if (error.status === 401) {
        setHealth("down", "needs a key");
        dispatchEvent(new Event("keyneeded"));
        await until("keychosen", window);
      } else {
        setHealth("down", error.status === 503 ? "engine not ready" : "not reachable");
        await pause(RETRY_MS);
      }
    }
  }
}
