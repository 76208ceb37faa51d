/* Which characters of an answer are whose: texts of tokens are not always what an answer shows. */

const BROKEN = "\ufffd";
const AHEAD = 8;

/**
 * Gives each piece of text to the token it is of.
 *
 * Text may come later than its tokens (a character of several tokens, what might begin a stop
 * string), or never (special tokens). The text that comes is what is shown, always.
 */
export class Aligner {
  #waiting = [];
  #half = "";

  /**
   * Take a chunk: its tokens, `{ text, ... }`, and its text. Returns runs `{ text, token }`, whose
   * texts joined are the chunk's; `token` is null where nothing is known.
   */
  push(tokens, text) {
    for (const token of tokens) this.#waiting.push({ token, text: token.text });
    let rest = this.#half + text;
    this.#half = "";
    if (isFirstHalf(rest)) {
      this.#half = rest.slice(-1);
      rest = rest.slice(0, -1);
    }
    const runs = [];
    while (rest) {
      const { size, token } = this.#take(rest);
      if (size) runs.push({ text: rest.slice(0, size), token });
      rest = rest.slice(size);
    }
    return runs;
  }

  /** Text that is still held back, and tokens that were never shown. */
  end() {
    const left = { text: this.#half, tokens: this.#waiting.map((one) => one.token) };
    this.#half = "";
    this.#waiting = [];
    return left;
  }

  #take(rest) {
    const waiting = this.#waiting;
    const first = waiting[0];
    if (first === undefined) return { size: rest.length, token: null };
    if (first.text.includes(BROKEN)) return this.#takeBroken(rest);
    if (rest.startsWith(first.text)) {
      waiting.shift();
      return { size: first.text.length, token: first.token };
    }
    if (first.text.startsWith(rest)) {
      first.text = first.text.slice(rest.length);
      return { size: rest.length, token: first.token };
    }
    const trimmed = first.text.trimStart();
    if (trimmed && rest.startsWith(trimmed)) {
      waiting.shift();
      return { size: trimmed.length, token: first.token };
    }
    const next = waiting.findIndex(
      (one, place) => place > 0 && place <= AHEAD && one.text && rest.startsWith(one.text),
    );
    if (next > 0) {
      waiting.splice(0, next); // special ones, which the text leaves out
      return { size: 0, token: null };
    }
    waiting.length = 0;
    return { size: rest.length, token: first.token };
  }

  /** Tokens that are parts of characters, up to the next whole one. */
  #takeBroken(rest) {
    const waiting = this.#waiting;
    let count = waiting.findIndex((one) => !one.text.includes(BROKEN));
    if (count < 0) count = waiting.length;
    const token = waiting[count - 1].token;
    const next = waiting[count]?.text;
    const found = next ? rest.indexOf(next, 1) : -1;
    waiting.splice(0, count);
    return { size: found > 0 ? found : rest.length, token };
  }
}

/** A token as one can see it, at most `most` characters. */
export function shown(text, most = 14) {
  const signs = { " ": "␣", "\n": "↵", "\r": "↵", "\t": "⇥" };
  const whole = /^\s+$/.test(text);
  const letters = Array.from(text || "∅", (letter) =>
    letter === " " && !whole ? " " : (signs[letter] ?? (isUnseen(letter) ? "·" : letter)),
  );
  if (!whole && letters[0] === " ") letters[0] = "␣";
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : letters.join("");
}

function isUnseen(letter) {
  // Controls, and what changes the direction of what stands beside it.
  return /[\p{Cc}\p{Cf}\p{Cs}]/u.test(letter);
}

function isFirstHalf(text) {
  const last = text.charCodeAt(text.length - 1);
  return last >= 0xd800 && last < 0xdc00;
}
