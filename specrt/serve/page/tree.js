/* A round's tree: where its nodes lie, and its picture. */

import { shown } from "./tokens.js";

const SVG = "http://www.w3.org/2000/svg";
const ROW = 21;
const LETTER = 7.3; // of the monospaced 12 px
const GAP = 34;
const MARGIN = 10;
const MOST_LETTERS = 14;

/**
 * Nodes of a round: `{ depth, row, parent, kind, label }`, the root first. The way that was taken
 * is the first row; `kind` is root, accepted, refused or own (the target's token behind it).
 */
export function layOut(round) {
  const { tokens, parents, path } = round.tree;
  const taken = new Set(path);
  const nodes = tokens.map((token, place) => ({
    parent: parents[place],
    kind: place === 0 ? "root" : taken.has(place) ? "accepted" : "refused",
    label: shown(token, MOST_LETTERS),
    children: [],
  }));
  if (round.tokens.length > round.accepted) {
    const label = shown(round.tokens[round.accepted], MOST_LETTERS);
    const parent = path.at(-1) ?? 0;
    nodes.push({ parent, kind: "own", label, children: [] });
  }
  nodes.forEach((node, place) => {
    node.depth = place === 0 ? 0 : nodes[node.parent].depth + 1;
    if (place > 0) nodes[node.parent].children.push(node);
  });
  let row = -1;
  const open = [nodes[0]];
  let isBranch = true;
  while (open.length) {
    const node = open.pop();
    if (isBranch) row += 1;
    node.row = row;
    const ranks = { own: 0, accepted: 0, refused: 1 };
    node.children.sort((a, b) => ranks[a.kind] - ranks[b.kind]);
    open.push(...node.children.toReversed());
    isBranch = node.children.length === 0;
  }
  return nodes;
}

/** What a round did, in words. */
export function describe(round, number, count) {
  const head = `Round ${number} of ${count}: `;
  const drafted = round.tokens.slice(0, round.accepted);
  const own = round.tokens.slice(round.accepted);
  const parts = [];
  if (round.tree) {
    const proposed = round.tree.tokens.length - 1;
    parts.push(proposed ? `${plural(proposed, "token")} drafted` : "nothing drafted");
  }
  if (drafted.length) parts.push(`accepted ${quoted(drafted)}`);
  else if (round.tree?.tokens.length > 1) parts.push("none accepted");
  if (own.length) parts.push(`the target’s own ${quoted(own)}`);
  if (!round.tree) parts.push("its tree was not reported");
  return `${head}${parts.join("; ")}.`;
}

/** A picture of a round's tree. */
export function draw(round, words) {
  const nodes = layOut(round);
  const widths = [];
  for (const node of nodes) {
    widths[node.depth] = Math.max(widths[node.depth] ?? 0, width(node.label));
  }
  const lefts = [MARGIN];
  widths.forEach((size, depth) => lefts.push(lefts[depth] + size + GAP));
  const height = (Math.max(...nodes.map((node) => node.row)) + 1) * ROW + MARGIN;
  const svg = make("svg", { width: lefts.at(-1), height, role: "img", "aria-label": words });
  for (const node of nodes) {
    node.x = lefts[node.depth];
    node.y = MARGIN + 2 + node.row * ROW;
  }
  // Thick lines lie above thin ones.
  const byRank = [...nodes.slice(1)].sort((a, b) => (a.kind === "refused" ? -1 : 1) - (b.kind === "refused" ? -1 : 1));
  for (const node of byRank) svg.append(edge(nodes[node.parent], node));
  for (const node of nodes) svg.append(mark(node), text(node));
  return svg;
}

function edge(from, to) {
  const start = from.x + 10 + width(from.label);
  const end = to.x - 5;
  const d =
    from.row === to.row
      ? `M${start} ${from.y}H${end}`
      : `M${from.x} ${from.y + 5}V${to.y - 6}q0 6 6 6H${end}`;
  return make("path", { d, class: to.kind });
}

function mark(node) {
  const { x, y, kind } = node;
  if (kind === "own") return make("rect", { x: x - 4, y: y - 4, width: 8, height: 8, class: kind });
  return make("circle", { cx: x, cy: y, r: kind === "refused" ? 3.5 : 4, class: kind });
}

function text(node) {
  const element = make("text", { x: node.x + 8, y: node.y + 4, class: node.kind });
  element.textContent = node.label;
  return element;
}

function width(label) {
  const cells = Array.from(label).reduce((sum, letter) => sum + (letter >= "\u1100" ? 2 : 1), 0);
  return cells * LETTER;
}

function make(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function quoted(tokens) {
  return tokens.map((token) => `“${shown(token, 24)}”`).join(" ");
}

/** A count with its noun. */
export function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}
