/* One answer: what came of it, its figures, and its text in the page. */

import { Aligner } from "./tokens.js";
import { plural } from "./tree.js";

const MOST_RUNS = 300; // shown at once: then the page gets its turn
const LONG_LINE = 600; // runs; a block is laid out anew with each that is added to it
const ENDS = { length: "cut off at max tokens" };

/**
 * An answer as it comes. Data are taken at once by `take`, the page changes in `flush`: so that
 * whoever calls it decides how often.
 */
export class Answer {
  static #known = new WeakMap();

  /** The answer whose text an element is, or is in; undefined if none. */
  static of(element) {
    return Answer.#known.get(element.closest(".text"));
  }

  constructor(title) {
    this.rounds = [];
    this.tokens = [];
    this.text = "";
    this.report = null;
    this.usage = null;
    this.finish = null;
    this.words = ""; // its figures, once it has ended
    this.isShown = false; // all of it, and its figures
    this.element = make("div", "answer");
    this.shown = make("div", "text");
    this.shown.tabIndex = 0;
    this.shown.setAttribute("role", "group");
    this.shown.setAttribute("aria-label", `${title}; arrow keys go through its rounds`);
    this.numbers = make("p", "numbers");
    this.element.append(make("span", "who", title), this.shown, this.numbers);
    Answer.#known.set(this.shown, this);
  }

  #started = 0;
  #first = null;
  #last = null;
  #firstTokens = 0;
  #drafted = 0;
  #accepted = 0;
  #aligner = new Aligner();
  #runs = [];
  #line = null;
  #special = "";

  /** Its request is sent now. */
  begin() {
    this.#started = performance.now();
  }

  /** One event of the stream. */
  take(event) {
    const choice = event.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    const said = event.x_specrt;
    if (event.usage) this.usage = event.usage;
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    if (said?.rounds !== undefined) this.report = said;
    const tokens = said?.tokens ? this.#takeRound(said) : [];
    if (!text && !tokens.length) return;
    this.#last = performance.now();
    if (this.#first === null) {
      this.#first = this.#last;
      this.#firstTokens = tokens.length;
    }
    this.text += text;
    for (const run of this.#aligner.push(tokens, text)) this.#runs.push(run);
  }

  #takeRound({ accepted, tokens, tree }) {
    const round = { accepted, tokens, tree: tree ?? null, spans: [] };
    const number = this.rounds.push(round) - 1;
    for (const token of tokens) this.tokens.push(token);
    this.#accepted += accepted;
    this.#drafted += tree ? tree.tokens.length - 1 : 0;
    return tokens.map((token, place) => ({ text: token, round: number, isDrafted: place < accepted }));
  }

  /** Tokens that came, as far as that is known. */
  get numTokens() {
    return this.usage?.completion_tokens ?? this.tokens.length;
  }

  /** Figures so far; null where there is none yet. */
  get figures() {
    const rounds = this.report?.rounds ?? this.rounds.length;
    const count = this.numTokens;
    const drafted = this.report?.drafted ?? this.#drafted;
    const accepted = this.report?.accepted ?? this.#accepted;
    const behind = count - (this.#firstTokens || (rounds ? count / rounds : 0));
    const seconds = (this.#last - this.#first) / 1000;
    return {
      count,
      rate: behind > 0 && seconds > 0 ? behind / seconds : null,
      tau: this.report?.tau ?? (rounds ? count / rounds : null),
      share: drafted ? accepted / drafted : null,
      first: this.#first === null ? null : this.#first - this.#started,
    };
  }

  /** Show what came since the last time, or a part of it if it is much. */
  flush() {
    for (const run of this.#runs.splice(0, MOST_RUNS)) this.#append(run);
    if (this.isBehind || !this.words) return;
    if (this.#special) (this.#line ?? this.shown).append(make("span", "special", this.#special));
    this.numbers.textContent = this.words;
    this.isShown = true;
  }

  /** Whether there is more to show than the last flush took. */
  get isBehind() {
    return this.#runs.length > 0;
  }

  /** Nothing more comes: how it ended, where it did not by itself. */
  end(how = null) {
    const { text, tokens } = this.#aligner.end();
    if (text) this.#runs.push({ text, token: null });
    this.words = this.#words(how);
    if (this.finish === "stop") this.#special = tokens.map((token) => token.text).join("");
  }

  /** Light the text of a round, or put it out. */
  light(place, isOn) {
    for (const span of this.rounds[place]?.spans ?? []) span.classList.toggle("on", isOn);
  }

  #append({ text, token }) {
    const kind = token === null ? "" : token.isDrafted ? "d" : "t";
    for (const piece of text.split(/(?<=\n)/)) {
      if (this.#line === null) {
        this.#line = make("div", "");
        this.shown.append(this.#line);
      }
      const last = this.#line.lastChild;
      const isSame = last && last.className.replace(" on", "") === kind && isOf(last, token);
      if (isSame) last.firstChild.appendData(piece);
      else this.#line.append(this.#span(kind, piece, token));
      const count = this.#line.childElementCount;
      const isLong = count >= 2 * LONG_LINE || (count >= LONG_LINE && /\s$/.test(piece));
      if (piece.endsWith("\n") || isLong) this.#line = null;
    }
  }

  #span(kind, piece, token) {
    const span = make("span", kind, piece);
    if (token !== null) {
      span.dataset.round = token.round;
      this.rounds[token.round].spans.push(span);
    }
    return span;
  }

  #words(how) {
    const { count, rate, tau, share, first } = this.figures;
    const words = [];
    if (count) words.push(plural(count, "token"));
    if (rate !== null) words.push(`${number(rate)} tokens/s`);
    if (tau !== null) words.push(`tau ${tau.toFixed(2)}`);
    if (share !== null) words.push(`${percent(share)} of drafted tokens accepted`);
    if (first !== null) words.push(`the first after ${Math.round(first)} ms`);
    if (this.report) words.push(`rounds took the server ${Math.round(this.report.round_ms)} ms`);
    const end = how ?? ENDS[this.finish];
    if (end) words.push(end);
    return words.join(" · ") || "nothing came";
  }
}

/** An element with a class and a text, which is never read as HTML. */
export function make(name, kind, text = "") {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  if (text) element.textContent = text;
  return element;
}

/** A rate for people. */
export function number(value) {
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
}

/** A share for people. */
export function percent(share) {
  return `${Math.round(share * 100)} %`;
}

function isOf(span, token) {
  return (span.dataset.round ?? "") === String(token?.round ?? "");
}
