/* The playground: what is asked, and what is shown of it. */

import { Answer, make, number, percent } from "./answer.js";
import { CallError, ask, get } from "./stream.js";
import { describe, draw, plural } from "./tree.js";

const KEY = "specrt.key";
const WARM_TOKENS = 8; // decoded before either side is timed
const BUSY_MS = 8; // of work, after which the page gets its turn
const FIGURES_MS = 100;
const SPOKEN_LETTERS = 1000;
const EXAMPLES = [
  "Lisa has 6 boxes of pencils. Each box has 12 pencils. She gives 15 pencils to her brother. How many pencils does Lisa have left?",
  "A train travels 60 miles per hour for 3 hours and then 40 miles per hour for 2 hours. How many miles does it travel in total?",
];

const at = (id) => document.getElementById(id);
const talk = at("talk");
const promptBox = at("prompt");
const isCalm = matchMedia("(prefers-reduced-motion: reduce)");

const state = {
  model: null,
  turns: [], // messages of the conversation
  running: null, // what stops the answer under way
  last: null, // the newest answer
  chosen: null, // the round that is shown: { answer, place }
  isPinned: false, // whether somebody chose it
  isBelow: true, // whether the newest text is in sight, and is to stay there
};

/* --- settings ------------------------------------------------------------------------------- */

function savedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // the browser keeps nothing for this page
  }
}

function saveKey(key) {
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // as above
  }
}

/** What the settings say; null, and the field to blame is shown, where they cannot be. */
function settings() {
  if (!at("settings").reportValidity()) return null;
  const value = (id) => (at(id).value === "" ? null : at(id).valueAsNumber);
  return {
    isChat: document.querySelector("input[name=mode]:checked").value === "chat",
    isCompared: at("compare").checked,
    hasTrees: at("trees").checked,
    isDrafted: at("speculate").checked,
    depth: value("depth"),
    system: at("system").value,
    key: at("key").value.trim(),
    model: state.model,
    sampling: {
      temperature: value("temperature"),
      top_p: value("top-p"),
      max_tokens: value("max-tokens"),
      seed: value("seed") ?? drawn(),
    },
  };
}

function drawn() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/** A request's path and body. */
function request(prompt, wanted, { isDrafted, ...more }) {
  const body = { stream: true, stream_options: { include_usage: true } };
  if (wanted.model) body.model = wanted.model;
  for (const [name, value] of Object.entries(wanted.sampling)) {
    if (value !== null) body[name] = value;
  }
  if (wanted.hasTrees) body.x_specrt = { trees: true };
  body.speculative = { enabled: isDrafted };
  if (isDrafted && wanted.depth !== null) body.speculative.max_tokens = wanted.depth;
  Object.assign(body, more);
  if (!wanted.isChat) return { path: "v1/completions", body: { ...body, prompt } };
  const system = wanted.system ? [{ role: "system", content: wanted.system }] : [];
  const messages = [...system, ...state.turns, { role: "user", content: prompt }];
  return { path: "v1/chat/completions", body: { ...body, messages } };
}

/* --- one turn -------------------------------------------------------------------------------- */

async function send() {
  if (state.running) return;
  const prompt = promptBox.value;
  const wanted = settings();
  if (wanted === null || !prompt.trim()) return;
  promptBox.value = "";
  const turn = make("article", "turn");
  turn.append(asked(prompt, wanted));
  at("empty").hidden = true;
  talk.append(turn);
  state.isBelow = true;
  await answered(turn, prompt, wanted);
}

function asked(prompt, wanted) {
  const box = make("div", "asked");
  const title = wanted.isChat ? "You" : "Prompt";
  box.append(make("span", "who", `${title} · seed ${wanted.sampling.seed}`), make("span", "", prompt));
  return box;
}

async function answered(turn, prompt, wanted) {
  const stopping = new AbortController();
  setRunning(stopping);
  tell("Answering.");
  try {
    const run = wanted.isCompared ? compared : single;
    await run(turn, prompt, wanted, stopping.signal);
  } catch (error) {
    if (!stopping.signal.aborted) fail(turn, prompt, wanted, error);
  } finally {
    setRunning(null);
    paint(true);
  }
}

async function single(turn, prompt, wanted, signal) {
  const answer = new Answer(wanted.isDrafted ? "Answer" : "Answer, plain decoding");
  turn.append(answer.element);
  await stream(answer, request(prompt, wanted, { isDrafted: wanted.isDrafted }), wanted.key, signal);
  keep(prompt, answer, wanted);
  tell(`${spoken(answer)} ${answer.words}`);
}

/** Plain decoding and speculation, one behind the other: at once they would share the machine. */
async function compared(turn, prompt, wanted, signal) {
  const sides = make("div", "sides");
  const plain = new Answer("Plain decoding");
  const fast = new Answer("With speculation");
  const verdict = make("p", "verdict");
  sides.append(plain.element, fast.element, verdict);
  turn.append(sides);
  const salt = `page-${drawn()}-${drawn()}`; // neither finds what earlier turns computed
  try {
    for (const answer of [plain, fast]) {
      const options = { isDrafted: answer === fast, cache_salt: salt };
      verdict.textContent = `${answer === fast ? "Speculation" : "Plain decoding"} runs; one after the other, each behind ${WARM_TOKENS} tokens that do not count.`;
      const warm = request(prompt, wanted, { ...options, max_tokens: WARM_TOKENS });
      for await (const _ of ask(warm.path, warm.body, wanted.key, signal));
      await stream(answer, request(prompt, wanted, options), wanted.key, signal);
      if (signal.aborted) break;
    }
  } finally {
    judge(verdict, plain, fast, signal.aborted);
  }
  keep(prompt, fast, wanted);
  tell(`${verdict.textContent} ${spoken(fast)}`);
}

/** Whether both sides said the same, and how fast. */
function judge(verdict, plain, fast, isStopped) {
  const has = plain.tokens.length > 0 || fast.tokens.length > 0;
  const [left, right] = has ? [plain.tokens, fast.tokens] : [[...plain.text], [...fast.text]];
  const noun = has ? "token" : "character";
  const shorter = Math.min(left.length, right.length);
  if (!shorter) {
    verdict.remove();
    return;
  }
  let equal = 0;
  while (equal < shorter && left[equal] === right[equal]) equal += 1;
  const isWhole = Boolean(plain.finish && fast.finish) && !isStopped;
  verdict.textContent = "";
  if (equal < shorter || (isWhole && left.length !== right.length)) {
    verdict.classList.add("failed");
    verdict.append(make("strong", "", `Different from ${noun} ${equal + 1} on.`));
    return;
  }
  const words = isWhole ? `Equal: all of ${plural(equal, noun)}.` : `Equal as far as both went: ${plural(equal, noun)}.`;
  verdict.append(make("strong", "", words));
  const [slow, quick] = [plain.figures.rate, fast.figures.rate];
  if (!isWhole || !slow || !quick) return;
  const tau = fast.figures.tau;
  verdict.append(
    ` ${number(slow)} tokens/s plain, ${number(quick)} with speculation: `,
    make("strong", "", `${(quick / slow).toFixed(2)} times as fast`),
    `${tau === null ? "" : `, tau ${tau.toFixed(2)}`}. One ran after the other; the prompt’s pass does not count.`,
  );
}

async function stream(answer, { path, body }, key, signal) {
  state.last = answer;
  state.isPinned = false;
  open.add(answer);
  answer.begin();
  let since = performance.now();
  let how = "broke off";
  try {
    for await (const event of ask(path, body, key, signal)) {
      answer.take(event);
      schedule();
      if (performance.now() - since > BUSY_MS) {
        await breath();
        since = performance.now();
      }
    }
    how = null;
  } catch (error) {
    if (!signal.aborted) throw error;
    how = "stopped";
  } finally {
    answer.end(how);
    schedule();
  }
}

/** Let the page have its turn; timers would be slowed down where it is not seen. */
function breath() {
  return new Promise((resume) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resume();
    };
    port2.postMessage(null);
  });
}

function keep(prompt, answer, wanted) {
  if (!wanted.isChat || !answer.text) return;
  state.turns.push({ role: "user", content: prompt }, { role: "assistant", content: answer.text });
}

/** An error, where its answer would be, with what can be done. */
function fail(turn, prompt, wanted, error) {
  const isKnown = error instanceof CallError;
  if (!isKnown) console.error(error);
  const box = make("p", "failed");
  box.setAttribute("role", "alert");
  turn.append(box);
  box.append(isKnown ? error.message : "The page failed; the browser’s console says more.");
  const offer = (words, action) => {
    const button = make("button", "", words);
    button.type = "button";
    button.addEventListener("click", action);
    box.append(button);
  };
  if (error.status === 401) offer("To the API key", () => at("key").focus());
  if (wanted.isChat && /no chat template/.test(error.message)) {
    offer("Go on as text", () => again(turn, prompt, { ...settings(), isChat: false }, true));
  }
  offer("Try again", () => again(turn, prompt, settings(), false));
}

function again(turn, prompt, wanted, isText) {
  if (state.running || wanted === null) return;
  if (isText) document.querySelector("input[name=mode][value=text]").checked = true;
  turn.replaceChildren(asked(prompt, wanted));
  promptBox.focus();
  void answered(turn, prompt, wanted);
}

function spoken(answer) {
  const text = answer.text.trim();
  return text.length > SPOKEN_LETTERS ? `${text.slice(0, SPOKEN_LETTERS)} …` : text;
}

/* --- what is shown --------------------------------------------------------------------------- */

const open = new Set(); // answers of which not all is shown yet
let frame = 0;
let nextPaint = 0;
let nextFigures = 0;

function schedule() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (performance.now() < nextPaint) schedule();
    else paint(false);
  });
}

/** Show what came, in half of the time at most: the page answers always. */
function paint(isLast) {
  const started = performance.now();
  for (const answer of open) {
    answer.flush();
    if (answer.isShown) open.delete(answer);
    else if (answer.isBehind) schedule();
  }
  if (isLast || started >= nextFigures) {
    nextFigures = started + FIGURES_MS;
    showFigures();
    if (!state.isPinned && (isLast || !isCalm.matches)) showNewest();
  } else {
    schedule(); // the last figures of a stream that falls silent
  }
  if (state.isBelow) talk.scrollTop = talk.scrollHeight;
  const ended = performance.now();
  nextPaint = 2 * ended - started;
}

function showFigures() {
  const figures = state.last?.figures ?? {};
  const show = (id, value, words) => (at(id).textContent = value == null ? "–" : words(value));
  show("rate", figures.rate, number);
  show("tau", figures.tau, (tau) => tau.toFixed(2));
  show("share", figures.share, percent);
  show("count", figures.count || null, (count) => count.toLocaleString("en"));
  show("first", figures.first, (ms) => `${Math.round(ms)} ms`);
}

function showNewest() {
  const count = state.last?.rounds.length ?? 0;
  if (count) choose(state.last, count - 1, false);
}

/** Show a round: its tree, its words, its text in the answer. */
function choose(answer, place, isLit) {
  state.chosen?.answer.light(state.chosen.place, false);
  const count = answer.rounds.length;
  const round = answer.rounds[place];
  const words = describe(round, place + 1, count);
  state.chosen = { answer, place };
  if (isLit) answer.light(place, true);
  const pick = at("pick");
  pick.disabled = false;
  pick.max = String(count);
  pick.value = String(place + 1);
  pick.setAttribute("aria-valuetext", words);
  at("place").textContent = `${place + 1} of ${count}`;
  at("said").textContent = words.slice(words.indexOf(": ") + 2);
  at("tree").replaceChildren(...(round.tree ? [draw(round, words)] : []));
}

function pin(answer, place) {
  state.isPinned = true;
  choose(answer, place, true);
}

function setRunning(stopping) {
  state.running = stopping;
  const isRunning = stopping !== null;
  const hadFocus = document.activeElement === at("stop");
  at("send").disabled = at("clear").disabled = isRunning;
  at("stop").disabled = !isRunning;
  talk.setAttribute("aria-busy", String(isRunning));
  if (hadFocus && !isRunning) promptBox.focus();
}

function tell(words) {
  at("status").textContent = words;
}

function clear() {
  if (state.running) return;
  Object.assign(state, { turns: [], last: null, chosen: null, isPinned: false });
  for (const turn of talk.querySelectorAll(".turn")) turn.remove();
  at("empty").hidden = false;
  at("tree").replaceChildren();
  at("said").textContent = "No round yet.";
  at("place").textContent = "–";
  at("pick").disabled = true;
  showFigures();
  tell("Cleared.");
  promptBox.focus();
}

/* --- the model ------------------------------------------------------------------------------- */

async function findModels() {
  const said = at("model");
  const pick = at("models");
  try {
    const models = (await get("v1/models", at("key").value.trim())).data;
    pick.replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    pick.hidden = models.length < 2;
    const show = () => {
      const model = models.find((one) => one.id === pick.value);
      state.model = model.id;
      const facts = [model.id, model.drafter, model.max_model_len && `context of ${plural(model.max_model_len, "token")}`];
      said.textContent = facts.filter(Boolean).join(" · ");
    };
    pick.onchange = show;
    show();
  } catch (error) {
    state.model = null;
    said.textContent = error instanceof CallError ? error.message : "The server named no model.";
  }
}

/* --- what people do -------------------------------------------------------------------------- */

talk.addEventListener("scroll", () => {
  state.isBelow = talk.scrollTop + talk.clientHeight > talk.scrollHeight - 40;
});

talk.addEventListener("pointerover", (event) => {
  const span = event.target.closest("[data-round]");
  if (span) pin(Answer.of(span), Number(span.dataset.round));
});

talk.addEventListener("focusin", (event) => {
  const answer = Answer.of(event.target);
  if (answer?.rounds.length && state.chosen?.answer !== answer) pin(answer, 0);
});

talk.addEventListener("keydown", (event) => {
  const answer = event.target.classList.contains("text") ? Answer.of(event.target) : undefined;
  const count = answer?.rounds.length ?? 0;
  if (!count || event.altKey || event.ctrlKey || event.metaKey) return;
  const place = state.chosen?.answer === answer ? state.chosen.place : -1;
  const goals = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: count - 1 };
  if (!(event.key in goals)) return;
  event.preventDefault();
  pin(answer, Math.max(0, Math.min(count - 1, goals[event.key])));
  tell(at("pick").getAttribute("aria-valuetext"));
});

at("pick").addEventListener("input", (event) => {
  pin(state.chosen.answer, event.target.valueAsNumber - 1);
});

promptBox.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  void send();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.running?.abort();
});

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  void send();
});
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("stop").addEventListener("click", () => state.running?.abort());
at("clear").addEventListener("click", clear);
at("key").addEventListener("change", () => {
  saveKey(at("key").value.trim());
  void findModels();
});
for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", () => (at("system").disabled = radio.value !== "chat"));
}

for (const example of EXAMPLES) {
  const button = make("button", "", example);
  button.type = "button";
  button.addEventListener("click", () => {
    promptBox.value = example;
    promptBox.focus();
  });
  at("examples").append(button);
}
at("key").value = savedKey();
void findModels();
